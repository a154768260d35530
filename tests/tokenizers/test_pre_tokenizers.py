"""How byte-pair vocabularies cut texts into words: against a regular expression engine, and worked out by hand."""

from __future__ import annotations

import random
import re
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers
from vocabulary_files import random_text

from trichord.tokenizers.pre_tokenizers import PRE_TOKENIZERS
from trichord.tokenizers.tokenizer import MODELS

CASELESS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
KIMI_UPPER, KIMI_LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# The models' own expressions, where the table has others that come to the same. Some take quadratic time.
ORIGINALS = {
    "deepseek-llm": {3: r"\s+$"},
    "jais-2": {
        0: CASELESS
        + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        + "|".join(rf"\s{{{1 << power}}}(?!\S)" for power in range(9, 1, -1))
        + r"|\s{1,2}(?!\S)|\s{1}"
    },
    "kimi-k2": {
        0: rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{KIMI_UPPER}*{KIMI_LOWER}+{CASELESS}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{KIMI_UPPER}+{KIMI_LOWER}*{CASELESS}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
    },
    "chameleon": {1: "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", 2: r"([\t\n]|    |  )"},
    "tiny_aya": {0: r"\d{1,3}(?=(?:\d{3})*\b)"},
    "superbpe": {1: r"(?=(\d{3})+(?!\d))"},
    "afmoe": {0: r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"},
}
ORIGINALS["cohere2moe"] = ORIGINALS["tiny_aya"]
ORIGINALS["llama-bpe"] = {0: CASELESS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES}
ORIGINALS["gpt-4o"] = {
    0: rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{CASELESS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{CASELESS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
}
FRAGMENTS = (
    *("<sentinel:12>", "IMGIMGABZ", "IMGIMGABCDEZ", "漢字々〇", "ひらがな", "カナ", "。。", "…", "ㄅㄆ", "ㄱㄴ", "ไทย"),
    *("1234567", "1234a", "12.345", "a1b22c333", "½¾", "٣٤٥٦", "HelloWorld", "ÉCOLEa", "don'T", "e\u0301É\u0301"),
    *(" " * 700, "\n \n", "\t\t!", "    ", " \n  \r\n x", "/ /\n", "x y z ", "\u3000\u3000", "🦙 ", "𠀀𠀁", "\x85\xa0"),
)


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_words_are_those_of_a_regular_expression_engine(name: str) -> None:
    row = PRE_TOKENIZERS[name]
    patterns = [ORIGINALS.get(name, {}).get(index, pattern) for index, pattern in enumerate(row.patterns)]
    oracle = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns])
    draw = random.Random(name)
    for length in [0, 1, 2, 5, 20, 60, 200]:
        text = random_text(draw, length) + "".join(draw.choices(FRAGMENTS, k=length // 2))
        if name == "superbpe":  # which differs where a fraction follows digits
            text = "".join(character for character in text if unicodedata.category(character) not in ("No", "Nl"))
        words = [word for word, _ in oracle.pre_tokenize_str(text.replace(" ", row.space))]
        if row.drops_space:
            words = [word for word in words if not re.fullmatch(r"[^\S\x1c-\x1f]+", word)]
        assert list(row.split(text)) == words


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "default": ["Hello", ",", " world", "'", "s", " ", "123", "45", "\n\n", "\n", "x"],
        "gpt-2": ["Hello", ",", " world", "'s", " 12345", "\n\n", "\n", "x"],
        "llama-bpe": ["Hello", ",", " world", "'s", " ", "123", "45", "\n\n\n", "x"],
        "qwen2": ["Hello", ",", " world", "'s", " ", "1", "2", "3", "4", "5", "\n\n\n", "x"],
        "starcoder": ["Hello", ",", " world", "'s", " ", "1", "2", "3", "4", "5", "\n\n", "\n", "x"],
        "deepseek-v3": ["Hello", ",", " world", "'s", " ", "123", "45", "\n\n\n", "x"],
        "gpt-4o": ["Hello", ",", " world's", " ", "123", "45", "\n\n\n", "x"],
        "afmoe": ["Hello", ",", " world", "'s", " ", "12", "345", "\n\n\n", "x"],
        "tiny_aya": ["Hello", ",", " world's", " ", "12", "345", "\n\n\n", "x"],
        "superbpe": ["Hello, world's ", "12", "345", "\n\n\nx"],
        "kimi-k2": ["Hello", ",", " world's", " ", "123", "45", "\n\n\n", "x"],
        "exaone-moe": ["Hello", ",", " world", "'s", " ", "1", "2", "3", "4", "5", "\n\n\n", "x"],
        "ufakzeka": ["Hello", ",", " world", "'s", " ", "1", "2", "3", "4", "5", "\n\n\n", "x"],
        "minicpm5": ["Hello", ",", " world", "'s", " ", "123", "45", "\n\n\n", "x"],
        "chameleon": ["Hello", ",", " world", "'", "s", " ", "1", "2", "3", "4", "5", "\n", "\n", "\n", "x"],
        "laguna": ["Hello", ",", " world", "'s", " ", "1", "2", "3", "4", "5", "\n\n\n", "x"],
        "spark2_5": ["Hello", ",", " world", "'s", " ", "1", "2", "3", "4", "5", "\n", "\n", "\n", "x"],
        "youtu": ["Hello", ",", " world's", " ", "1", "2", "3", "4", "5", "\n\n\n", "x"],
        "jais-2": ["Hello", ",", " world", "'s", " ", "123", "45", "\n\n\n", "x"],
        "deepseek-llm": ["Hello", ",", " world", "'", "s", " ", "12345", "\n", "\n", "\n", "x"],
        "deepseek-coder": ["Hello", ",", " world", "'", "s", " ", "1", "2", "3", "4", "5", "\n", "\n", "\n", "x"],
        "seed-coder": ["Hello", ",", " world", "'s", " ", "1", "2", "3", "4", "5", "\n\n\n", "x"],
        "bailingmoe": ["Hello", ",", " world", "'s", " ", "1", "2", "3", "4", "5", "\n\n\n", "x"],
        "tekken": ["Hello", ",", " world", "'s", " ", "1", "2", "3", "4", "5", "\n\n\n", "x"],
        "falcon": ["Hello", ",", " world", "'", "s", " ", "123", "45", "\n\n", "\n", "x"],
        "viking": ["Hello", ",", " world's", " ", "1", "2", "3", "4", "5", "\n\n\n", "x"],
        "gemma4": ["Hello,▁world's▁12345", "\n\n\n", "x"],
        "whitespace": ["Hello,", "world's", "12345", "x"],
        "bloom": ["Hello", ",", " world's", " 12345", "\n\n\n", "x"],
    }.items(),
)
def test_words_worked_out_by_hand(name: str, words: list[str]) -> None:
    assert list(PRE_TOKENIZERS[name].split("Hello, world's 12345\n\n\nx")) == words


def test_every_name_that_llama_cpp_knows() -> None:
    """As of its chain of comparisons with `tokenizer_pre` in src/llama-vocab.cpp."""
    names = (
        "default minicpm5 llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano "
        "deepseek-llm deepseek-coder deepseek-v3 spark2_5 youtu falcon mpt starcoder gpt-2 phi-2 jina-es jina-de "
        "gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jais-2 gemma4 granite-embed-multi-311m "
        "sarvam-moe jina-v1-en jina-v2-code roberta-bpe whitespace refact command-r qwen2 deepseek-r1-qwen kormo "
        "f2llmv2 qwen35 stablelm2 olmo dbrx smaug-bpe poro-chat glm4 chatglm-bpe viking jais tekken smollm "
        "codeshell bloom gpt3-finnish exaone exaone4 exaone-moe chameleon minerva-7b megrez gpt-4o llama4 kanana2 "
        "talkie granite-embed-multi-97m tiny_aya cohere2moe superbpe trillion granite-docling bailingmoe "
        "bailingmoe2 llada-moe seed-coder hunyuan hunyuan-dense hy_v4 joyai-llm kimi-k2 ufakzeka grok-2 afmoe "
        "laguna minimax-m2 solar-open mellum2 "
    )
    assert set(names.split()) == set(PRE_TOKENIZERS)


@pytest.mark.parametrize(
    ("flag", "names"),
    [
        (
            "adds_bos",
            "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken chameleon gemma4"
            " granite-embed-multi-311m",
        ),
        ("insists_on_bos", "gemma4 granite-embed-multi-311m"),
        (
            "whole_words",
            "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken minicpm5 youtu"
            " granite-embed-multi-97m gemma4 granite-embed-multi-311m",
        ),
    ],
)
def test_what_comes_with_a_name(flag: str, names: str) -> None:
    assert {name for name, row in PRE_TOKENIZERS.items() if getattr(row, flag)} == set(names.split())


@pytest.mark.parametrize("name", sorted({row.patterns: name for name, row in PRE_TOKENIZERS.items()}.values()))
def test_no_text_takes_quadratic_time(name: str) -> None:
    # Were one of the searches quadratic, some of these would take minutes.
    ends = [" 5", "\n5", "1a", "11", "'!", "é5", "É5", "\u0301 ", "\t!", "//", "漢5", "\xa05", "a ", "! "]
    for run, end in [*ends, ("<sentinel:", ""), ("IMG", ""), (" \n", "x")]:
        text = run * 40_000 + end
        words = "".join(PRE_TOKENIZERS[name].split(text))
        assert words == "".join(text.split()) if name == "whitespace" else len(words) == len(text)


def test_the_documentation_has_every_row() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "tokenizers.md").read_text(encoding="utf-8")
    table = page[page.index("| names |") :].splitlines()[2:]
    columns = [line.strip("| ").split("|") for line in table]
    written = {frozenset(re.findall("`([^`]+)`", names)): flags.strip() for names, flags, _ in columns}
    rows: dict[int, list[str]] = {}
    for name, row in PRE_TOKENIZERS.items():
        rows.setdefault(id(row), []).append(name)
    flags = {"begins": "adds_bos", "whole": "whole_words"}
    assert written == {
        frozenset(names): ", ".join(word for word, flag in flags.items() if getattr(PRE_TOKENIZERS[names[0]], flag))
        for names in rows.values()
    }


def test_the_documentation_has_every_kind() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "tokenizers.md").read_text(encoding="utf-8")
    first_cells = "".join(re.findall(r"^\|([^|]*)\|", page[: page.index("## ")], re.MULTILINE)[2:])
    assert set(re.findall("`([^`]+)`", first_cells)) == {*MODELS, "none", "no_vocab"}
