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
from itertools import chain

_CATEGORIES = re.findall("..", "LuLlLtLmLoMnMcMeNdNlNoPcPdPsPePiPfPoSmScSkSoZsZlZpCcCfCsCoCn")
_STANDS_FOR = {category: chr(0x80 + index) for index, category in enumerate(_CATEGORIES)}
_NEXT_LINE = chr(0x80 + len(_CATEGORIES))  # U+0085, the one white space among the control characters beyond ASCII
# Unicode's White_Space; Python's own \s has U+001C to U+001F besides.
_COLLAPSED_SPACE = r"\t-\r " + _STANDS_FOR["Zs"] + _STANDS_FOR["Zl"] + _STANDS_FOR["Zp"] + _NEXT_LINE
_RAW_SPACE = "\\t-\\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


class _Collapsed(dict[int, str]):
    """A table for `str.translate`, filled in as characters turn up."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if code == 0x85:
            character = _NEXT_LINE
        elif code > 0x7F:
            character = _STANDS_FOR[unicodedata.category(character)]
        self[code] = character
        return character


_COLLAPSED = _Collapsed()


def _category(name: str) -> str:
    """The inside of a character class for one category ("Lu") or a group of them ("L"), over collapsed text."""
    ascii = (chr(code) for code in range(0x80))
    members = [re.escape(character) for character in ascii if unicodedata.category(character).startswith(name)]
    return "".join(members + [code for category, code in _STANDS_FOR.items() if category.startswith(name)])


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
        searched = text.translate(_COLLAPSED) if self._collapses and not text.isascii() else text
        pieces = filter(None, self._expression.split(searched))
        return pieces if searched is text else _cut_alike(text, pieces)


def _cut_alike(text: str, pieces: Iterator[str]) -> Iterator[str]:
    start = 0
    for piece in pieces:
        end = start + len(piece)
        yield text[start:end]
        start = end


@dataclass(frozen=True)
class PreTokenizer:
    """One way of cutting text, and what the vocabularies that use it have in common besides.

    `whole_words`: a word that is itself a token becomes that token, whatever the merges say. `adds_bos`: a text begins
    with the beginning-of-sequence token, where the file does not say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False

    @cached_property
    def _cuts(self) -> list[_Cut]:
        return [_Cut(pattern) for pattern in self.patterns]

    def split(self, text: str) -> Iterator[str]:
        """The words of a text in order; joined they are the text."""
        words: Iterable[str] = (text,)
        for cut in self._cuts:
            words = chain.from_iterable(map(cut.split, words))
        return iter(words)


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

_ROWS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": PreTokenizer(
        (_LLAMA3,), whole_words=True, adds_bos=True
    ),
    "dbrx smaug-bpe glm4 chatglm-bpe": PreTokenizer((_LLAMA3,)),
    "gpt-2 phi-2 mpt olmo jais trillion exaone4 gigachat a.x-4.0 mellum granite-docling jina-es jina-de": PreTokenizer(
        (_GPT2,)
    ),
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": PreTokenizer((r"\p{N}", _GPT2)),
    "qwen2 deepseek-r1-qwen stablelm2 megrez hunyuan grok-2 kormo solar-open": PreTokenizer((_QWEN2,)),
    "qwen35": PreTokenizer((_QWEN35,)),
    "falcon": PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "deepseek-llm": PreTokenizer(
        (r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _EAST_ASIAN, r"\p{N}+")
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm": PreTokenizer((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, adds_bos=True),
    "gpt-4o llama4 kanana2 minimax-m2": PreTokenizer((_GPT4O,)),
    "bailingmoe bailingmoe2 llada-moe": PreTokenizer((_BAILING,)),
    "seed-coder": PreTokenizer((_SEED,)),
    "bloom poro-chat gpt3-finnish": PreTokenizer((_BLOOM,)),
    "viking": PreTokenizer((_BLOOM, r"\p{N}")),
}
PRE_TOKENIZERS = {name: row for names, row in _ROWS.items() for name in names.split()}
