r"""How each byte-level BPE vocabulary cuts text into words before it merges bytes; merges never cross a cut.

`tokenizer.ggml.pre` names a row of the table below. A row is one or more regular expressions, the ones the models
were trained with, in the usual syntax with `\p{..}` for Unicode categories. Each expression in turn cuts the pieces
that the one before left: what it matches becomes pieces, and so does what lies between the matches.

Python's `re` has no `\p{..}`. So a text is searched in a collapsed form of equal length, in which each character
beyond ASCII is replaced by one that stands for its category: a category is then a handful of characters, and
matching is faster than in any engine that looks categories up. An expression that itself names characters beyond
ASCII is searched in the text as it is.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, filterfalse, pairwise

_CATEGORIES = re.findall("..", "LuLlLtLmLoMnMcMeNdNlNoPcPdPsPePiPfPoSmScSkSoZsZlZpCcCfCsCoCn")
# The script Han (Unicode 15.1, Scripts.txt): the one script that an expression names.
_HAN = re.compile(
    "[\u2e80-\u2e99\u2e9b-\u2ef3\u2f00-\u2fd5\u3005\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufa6d"
    "\ufa70-\ufad9\U00016fe2\U00016fe3\U00016ff0\U00016ff1\U00020000-\U0002a6df\U0002a700-\U0002b739"
    "\U0002b740-\U0002b81d\U0002b820-\U0002cea1\U0002ceb0-\U0002ebe0\U0002ebf0-\U0002ee5d\U0002f800-\U0002fa1d"
    "\U00030000-\U0003134a\U00031350-\U000323af]"
)
_STANDS_FOR = {
    name: chr(0x80 + index)
    for index, name in enumerate([*_CATEGORIES, *(f"{category}Han" for category in _CATEGORIES)])
}
_NEXT_LINE = chr(0x80 + len(_STANDS_FOR))  # U+0085, the one white space among the control characters beyond ASCII
# Unicode's White_Space; Python's own \s has U+001C to U+001F besides.
_COLLAPSED_SPACE = r"\t-\r " + _STANDS_FOR["Zs"] + _STANDS_FOR["Zl"] + _STANDS_FOR["Zp"] + _NEXT_LINE
_RAW_SPACE = "\\t-\\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_begins_with_space = re.compile(f"[{_RAW_SPACE}]").match


class _Collapsed(dict[int, str]):
    """A table for `str.translate`, filled in as characters turn up."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if code == 0x85:
            character = _NEXT_LINE
        elif code > 0x7F:
            character = _STANDS_FOR[unicodedata.category(character) + ("Han" if _HAN.match(character) else "")]
        self[code] = character
        return character


_COLLAPSED = _Collapsed()


def _category(name: str) -> str:
    """The inside of a character class for a category ("Lu"), a group of them ("L") or "Han", over collapsed text."""
    ascii = (chr(code) for code in range(0x80))
    members = [re.escape(character) for character in ascii if unicodedata.category(character).startswith(name)]
    names = (each for each in _STANDS_FOR if each.startswith(name) or (name == "Han" and each.endswith(name)))
    return "".join(members + [_STANDS_FOR[each] for each in names])


_SYNTAX = re.compile(r"\\p\{(?P<category>\w+)\}|(?P<space>\\[sS])|\\.|\[\^?|\]|.", re.DOTALL)


class _Cut:
    r"""One regular expression of a row. It may use `\p{..}`, `\s`, and `\S` outside classes; groups do not capture."""

    def __init__(self, pattern: str) -> None:
        self._collapses = pattern.isascii()
        space = _COLLAPSED_SPACE if self._collapses else _RAW_SPACE
        parts, in_class = [], False
        for item in _SYNTAX.finditer(pattern):
            part = item[0]
            if item["category"] or item["space"]:
                inside = _category(item["category"]) if item["category"] else space
                part = inside if in_class else f"[{'^' if part == chr(92) + 'S' else ''}{inside}]"
            elif part[0] in "[]":
                in_class = part != "]"
            parts.append(part)
        self._expression = re.compile(f"({''.join(parts)})")

    def split(self, text: str) -> Iterator[str]:
        """The pieces of the text in order, none empty."""
        return filter(None, self._parts(text))

    def _parts(self, text: str) -> Iterable[str]:
        """What lies between the matches, maybe empty, and the matches, by turns."""
        searched = text.translate(_COLLAPSED) if self._collapses and not text.isascii() else text
        parts = self._expression.split(searched)
        return parts if searched is text else _cut_alike(text, parts)


class _NumberCut(_Cut):
    """Cuts each match into groups of three characters, counted from its right end."""

    def split(self, text: str) -> Iterator[str]:
        """The pieces of the text in order, none empty."""
        for index, part in enumerate(self._parts(text)):
            if index % 2:
                ends = [*range(len(part) % 3 or 3, len(part), 3), len(part)]
                yield from (part[start:end] for start, end in pairwise([0, *ends]))
            elif part:
                yield part


def _cut_alike(text: str, parts: Iterable[str]) -> Iterator[str]:
    start = 0
    for part in parts:
        end = start + len(part)
        yield text[start:end]
        start = end


class Numbers(str):
    """An expression that matches numbers, to be cut into groups of three digits from the right.

    The models have expressions for that too. They look ahead from each group to the end of the number, which takes
    quadratic time.
    """


@dataclass(frozen=True)
class PreTokenizer:
    """One way of cutting text, and what the vocabularies that use it have in common besides.

    `whole_words`: a word that this expression matches, and that is itself a token, becomes that token, whatever the
    merges say. `adds_bos`: a text begins with the beginning-of-sequence token, where the file does not say;
    `insists_on_bos`: even if the file says no. `byte_level`: merges work on bytes, spelled as GPT-2 spells them; else
    on characters, with byte tokens for those that are no token. `space`: what spaces are replaced by. `drops_space`:
    white space only separates words.
    """

    patterns: tuple[str, ...]
    whole_words: str = ""
    adds_bos: bool = False
    insists_on_bos: bool = False
    byte_level: bool = True
    space: str = " "
    drops_space: bool = False

    @cached_property
    def _cuts(self) -> list[_Cut]:
        return [_NumberCut(pattern) if isinstance(pattern, Numbers) else _Cut(pattern) for pattern in self.patterns]

    def split(self, text: str) -> Iterator[str]:
        """The words of a text in order; joined they are the text, but for what `space` and `drops_space` say."""
        words: Iterable[str] = (text.replace(" ", self.space),)
        for cut in self._cuts:
            words = chain.from_iterable(map(cut.split, words))
        return filterfalse(_begins_with_space, words) if self.drops_space else iter(words)


_ALL = "(?s:.+)"
_CONTRACTION = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SYMBOLS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAPITALIZED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"

_GPT2 = r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACE}"
_QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SYMBOLS}|{_SPACE}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACE}"
)
_TEKKEN = rf"{'|'.join(_CAPITALIZED)}|\p{{N}}|{_SYMBOLS_AND_SLASHES}|{_SPACE}"
_GPT4O = (
    rf"{_CAPITALIZED[0]}(?:{_CONTRACTION})?|{_CAPITALIZED[1]}(?:{_CONTRACTION})?"
    rf"|\p{{N}}{{1,3}}|{_SYMBOLS_AND_SLASHES}|{_SPACE}"
)
_BAILING = (
    rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SYMBOLS}"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACE}"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACE}"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
# Letters of the scripts that have upper and lower case, as DeepSeek's first models list them. Escaped are those that
# Unicode normalization would replace by others.
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼ"
    "ℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    "𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_EAST_ASIAN = "[一-龥ࠀ-一가-퟿]+"
_LINES = (r"[^\n]+|\n+",)
_LAGUNA = (*_LINES, _QWEN2)
_EXAONE_MOE = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_MINICPM5 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}+|{_SYMBOLS}|{_SPACE}"
_UFAKZEKA = rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SYMBOLS}|{_SPACE}"
# Inside a run of white space there is no use in looking for its last newline again after each of the many steps.
_JAIS2 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS}|(?:(?<!\s)|(?<=[\r\n]))\s*[\r\n]+"
    r"|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)"
    r"|\s{1,2}(?!\S)|\s"
)
_UPPER_NO_HAN, _LOWER_NO_HAN = rf"(?:(?!\p{{Han}}){_UPPER})", rf"(?:(?!\p{{Han}}){_LOWER})"
_KIMI = (
    rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER_NO_HAN}*{_LOWER_NO_HAN}+(?:{_CONTRACTION})?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER_NO_HAN}+{_LOWER_NO_HAN}*(?:{_CONTRACTION})?|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACE}"
)
_SPARK = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+",
    r"\p{N}",
)
_YOUTU = (
    "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
    rf"{_CAPITALIZED[0]}(?:{_CONTRACTION})?|{_CAPITALIZED[1]}(?:{_CONTRACTION})?"
    rf"|\p{{N}}|{_SYMBOLS_AND_SLASHES}|{_SPACE}",
)
_AFMOE = (
    Numbers(r"\p{N}+"),
    "[一-鿿㐀-䶿\uf900-\ufaff぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+",
    _DEEPSEEK3,
)
_CHAMELEON = (
    "<sentinel:[0-9]+>",
    "IMGIMG[A-I]{1,4}Z",
    r"[\t\n]|    |  ",
    r"\p{N}",
    r"[\p{P}!-/:-@\[-`{-~]",
    _GPT2,
)
# The digits in groups of three; what stands before them in a number, such as a fraction, stays with the rest of them.
_SUPERBPE_NUMBERS = Numbers(r"(?<!\p{Nd}\p{Nd}\p{Nd})(?:\p{Nd}{3})+(?!\p{N})")
# Not of a number that a letter follows.
_TINY_AYA_NUMBERS = Numbers(r"(?<!\p{Nd})\p{Nd}+(?![\p{L}\p{M}\p{N}\p{Pc}])")

# Names and flags: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp (llama_vocab::impl::load).
# Expressions: the tokenizer.json of the model named above each row, as quoted in the same file (llm_tokenizer_bpe).
# Where that file simplifies one (it knows no upper and lower case beyond ASCII), the model's own counts here.
_ROWS: dict[str, PreTokenizer] = {
    # Made for files that name none, of the expressions of several models.
    "default": PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    # meta-llama/Meta-Llama-3-8B
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": PreTokenizer(
        (_LLAMA3,), whole_words=_ALL, adds_bos=True
    ),
    "dbrx smaug-bpe glm4 chatglm-bpe": PreTokenizer((_LLAMA3,)),
    # openai-community/gpt2
    "gpt-2 phi-2 mpt olmo jais trillion exaone4 gigachat a.x-4.0 mellum granite-docling jina-es jina-de jina-v1-en"
    " jina-v2-es jina-v2-de jina-v2-code roberta-bpe modern-bert": PreTokenizer((_GPT2,)),
    # bigcode/starcoder2-3b
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": PreTokenizer((r"\p{N}", _GPT2)),
    # Qwen/Qwen1.5-7B
    "qwen2 deepseek-r1-qwen stablelm2 megrez hunyuan grok-2 kormo f2llmv2 solar-open": PreTokenizer((_QWEN2,)),
    # Qwen/Qwen3.5-9B-Instruct
    "qwen35": PreTokenizer((_QWEN35,)),
    # Qwen's, line by line (no model is named there)
    "laguna": PreTokenizer(_LAGUNA),
    # Qwen's, without English contractions (no model is named there)
    "ufakzeka": PreTokenizer((_UFAKZEKA,)),
    # tiiuae/falcon-7b
    "falcon": PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    # deepseek-ai/deepseek-llm-7b-base
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_CASED_LETTERS}]+",
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
            r"(?<!\s)\s+$",
            _EAST_ASIAN,
            r"\p{N}+",
        )
    ),
    # deepseek-ai/deepseek-coder-6.7b-base
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}")),
    # deepseek-ai/DeepSeek-V3
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": PreTokenizer((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)),
    # DeepSeek's, each line end and digit apart (no model is named there)
    "spark2_5": PreTokenizer(_SPARK),
    # arcee-ai/Trinity-Tokenizer
    "afmoe": PreTokenizer(_AFMOE),
    # mistralai/Mistral-Nemo-Base-2407
    "tekken": PreTokenizer((_TEKKEN,), whole_words=_ALL, adds_bos=True),
    # Xenova/gpt-4o
    "gpt-4o llama4 kanana2 minimax-m2 talkie": PreTokenizer((_GPT4O,)),
    # GPT-4o's (no model is named there)
    "granite-embed-multi-97m": PreTokenizer((_GPT4O,), whole_words=_ALL),
    # CohereLabs/tiny-aya-base
    "tiny_aya cohere2moe": PreTokenizer((_TINY_AYA_NUMBERS, _GPT4O)),
    # tencent/Youtu-LLM-2B
    "youtu": PreTokenizer(_YOUTU, whole_words=_ALL),
    # moonshotai/Kimi-K2-Base (tokenization_kimi.py)
    "kimi-k2": PreTokenizer((_KIMI,)),
    # inclusionAI/Ling-lite
    "bailingmoe bailingmoe2 llada-moe": PreTokenizer((_BAILING,)),
    # ByteDance-Seed/Seed-Coder-8B-Base
    "seed-coder": PreTokenizer((_SEED,)),
    # openbmb/MiniCPM5-1B
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", _MINICPM5), whole_words=_ALL),
    # LGAI-EXAONE/K-EXAONE-236B-A23B
    "exaone-moe": PreTokenizer((_EXAONE_MOE,)),
    # inceptionai/Jais-2-8B-Chat
    "jais-2": PreTokenizer((_JAIS2,)),
    # facebook/chameleon-7b
    "chameleon": PreTokenizer(_CHAMELEON, adds_bos=True),
    # UW/OLMo2-8B-SuperBPE-t180k: words may hold spaces
    "superbpe": PreTokenizer((r"\p{N}+", _SUPERBPE_NUMBERS)),
    # bigscience/bloom
    "bloom poro-chat gpt3-finnish": PreTokenizer((_BLOOM,)),
    # LumiOpen/Viking-7B
    "viking": PreTokenizer((_BLOOM, r"\p{N}")),
    # Gemma 4: SentencePiece's alphabet, merged by rank; a word is a line
    "gemma4 granite-embed-multi-311m": PreTokenizer(
        _LINES, whole_words=r"\n+", adds_bos=True, insists_on_bos=True, byte_level=False, space="▁"
    ),
    # sarvamai/sarvam-30b
    "sarvam-moe": PreTokenizer(_LINES, byte_level=False, space="▁"),
    # jinaai/jina-embeddings-v2-base-zh
    "whitespace": PreTokenizer((r"\s+",), byte_level=False, drops_space=True),
}
PRE_TOKENIZERS = {name: row for names, row in _ROWS.items() for name in names.split()}
