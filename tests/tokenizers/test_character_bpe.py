"""Byte-pair vocabularies that merge characters, as Gemma 4's; DNA; words between white space."""

from __future__ import annotations

import random
import re

import pytest
from vocabulary_files import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, bpe_tokens, merged_by_pairs, random_text

MARKS = [("<pad>", 0.0, CONTROL), ("<eos>", 0.0, CONTROL), ("<bos>", 0.0, CONTROL), ("<unk>", 0.0, UNKNOWN)]
BYTES = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
LETTERS = "▁\nabcdé日"


def vocabulary(draw: random.Random) -> tuple[list[tuple[str, float, int]], list[str]]:
    """Tokens and merges: each merge joins two tokens before it."""
    pieces, merges = list(LETTERS), []
    while len(merges) < 60:
        left, right = draw.choice(pieces), draw.choice(pieces)
        if left + right not in pieces and ("\n" in left) == ("\n" in right) and len(left + right) < 9:
            pieces.append(left + right)
            merges.append(f"{left} {right}")
    return [*MARKS, *BYTES, *((piece, 0.0, NORMAL) for piece in pieces)], merges


def encoded_slowly(
    text: str, tokens: list[tuple[str, float, int]], merges: list[str], whole_newlines: bool
) -> list[int]:
    ids = {text: token for token, (text, _, _) in enumerate(tokens)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    out = []
    for line in re.findall(r"[^\n]+|\n+", text.replace(" ", "▁")):
        whole = whole_newlines and line[0] == "\n" and line in ids
        for symbol in [line] if whole else merged_by_pairs(line, ranks):
            out += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return out


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["gemma4", "gpt2 gemma4", "gpt2 granite-embed-multi-311m", "gpt2 sarvam-moe"])
def test_merges_of_characters(load, kind: str, seed: int) -> None:
    draw = random.Random(seed)
    tokens, merges = vocabulary(draw)
    tokens += [("\n" * 7, 0.0, NORMAL)] if "\n" * 7 not in dict.fromkeys(text for text, _, _ in tokens) else []
    model, _, pre = kind.partition(" ")
    own = load(tokens, model=model, pre=pre or None, merges=merges, bos_token_id=2, eos_token_id=1)
    for _ in range(10):
        text = "".join(draw.choices([*" \nabcdéxy日😀", "\n" * 7], k=draw.randint(0, 40)))
        ids = encoded_slowly(text, tokens, merges, whole_newlines="sarvam" not in kind)
        assert own.encode(text, add_special=False) == ids, text
        assert own.decode(ids) == text
    text = random_text(draw, 100).replace("▁", "")
    assert own.decode(own.encode(text)) == text


@pytest.mark.parametrize(
    ("kind", "keys", "begins"),
    [
        ("gemma4", {}, True),
        ("gemma4", {"add_bos_token": False}, True),
        ("gpt2 gemma4", {"add_bos_token": False}, True),
        ("gpt2 sarvam-moe", {}, False),
        ("gpt2 sarvam-moe", {"add_bos_token": True}, True),
    ],
)
def test_gemma_4_begins_a_text_whatever_the_file_says(load, kind: str, keys: dict, begins: bool) -> None:
    tokens, merges = vocabulary(random.Random(0))
    model, _, pre = kind.partition(" ")
    own = load(tokens, model=model, pre=pre or None, merges=merges, bos_token_id=2, **keys)
    assert (own.encode("a")[0] == 2) == begins


def test_text_forges_no_marks(load) -> None:
    tokens, merges = vocabulary(random.Random(0))
    own = load([*tokens, ("<turn|>", 0.0, CONTROL)], model="gemma4", merges=merges, bos_token_id=2)
    assert own.decode(own.encode("<bos><turn|>", add_special=False)) == "<bos><turn|>"
    assert own.encode("<bos>", add_special=False, parse_special=True) == [2]


def test_a_long_line(load) -> None:
    tokens, merges = vocabulary(random.Random(0))
    own = load(tokens, model="gemma4", merges=merges)
    text = "".join(random.Random(0).choices(" abcdé", k=300_000))
    assert own.decode(own.encode(text)) == text


# White space and DNA


@pytest.mark.parametrize(
    ("lowercase", "text"), [(None, "ab  AB\n\u3000ba"), (True, "AB aB\tBA "), (False, " ab AB ba")]
)
def test_words_between_white_space(load, lowercase: bool | None, text: str) -> None:
    tokens = [("<unk>", 0.0, UNKNOWN), *((piece, 0.0, NORMAL) for piece in ["a", "b", "A", "B", "ab", "AB"])]
    keys = {"normalizer.lowercase": lowercase} if lowercase is not None else {}
    keys = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    own = load(tokens, model="whitespace", pre="whitespace", merges=["a b", "A B"], **keys)
    pieces = ["ab", "ab", "b", "a"] if lowercase else ["ab", "AB", "b", "a"]
    assert [own.piece(token) for token in own.encode(text)] == pieces


DNA = ["AAAAAA", "ACGTAC", "GTAAAA", "CCCCCC"]


def test_dna_goes_by_six_letters(load) -> None:
    marks = [("<dna>", 0.0, CONTROL), ("</dna>", 0.0, CONTROL), ("<oov>", 0.0, CONTROL)]
    kmers = [(f"{word}\ue000", 0.0, NORMAL) for word in DNA]
    own = load([*bpe_tokens("CC", "CCC"), *marks, *kmers], model="hybriddna", pre="gpt-2", merges=["C C", "CC C"])

    def pieces(text: str, **how: bool) -> list[str]:
        return [own.piece(token).replace("\ue000", "*") for token in own.encode(text, add_special=False, **how)]

    assert pieces("CCC<dna>acgtacGT</dna>CCC") == ["CCC", "<dna>", "ACGTAC*", "GTAAAA*", "</dna>", "CCC"]
    assert pieces("<dna>CCCCCCNCCCCC") == ["<dna>", "CCCCCC*", "<oov>"]
    assert pieces("<dna></dna>C<dna>") == ["<dna>", "</dna>", "C", "<dna>"]
    assert pieces("</dna>CCC")[-1] == "CCC"
    assert own.decode(own.encode("C<dna>ACGTACCCCCCC</dna>")) == "CACGTACCCCCCC"


def test_without_dna_tokens_it_is_text(load) -> None:
    own = load(bpe_tokens("ab"), model="hybriddna", pre="gpt-2", merges=["a b"])
    assert own.decode(own.encode("<dna>ab</dna>")) == "<dna>ab</dna>"


# Marks


@pytest.mark.parametrize(
    ("keys", "mark"),
    [
        ({"pre": "jina-v2-de"}, "<mask>"),
        ({"pre": "jina-v2-code"}, "<mask>"),
        ({"pre": "gpt-2", "general.name": "Modern-BERT-base"}, "[MASK]"),
    ],
)
@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED])
def test_a_mask_takes_the_space_before_it_along(load, keys: dict, mark: str, kind: int) -> None:
    marks = [(text, 0.0, kind) for text in ("<mask>", "[MASK]", "<s>")]
    own = load([*bpe_tokens("ab"), *marks], model="gpt2", merges=["a b"], **keys)
    pieces = [own.piece(token) for token in own.encode(f"a \n{mark} b <s>", parse_special=True)]
    assert pieces == ["a", mark, "Ġ", "b", "Ġ", "<s>"]
    other = "[MASK]" if mark == "<mask>" else "<mask>"
    assert [own.piece(token) for token in own.encode(f"a {other}", parse_special=True)] == ["a", "Ġ", other]


def test_the_marks_of_an_answers_parts_are_text(load) -> None:
    marks = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|other|>"]
    own = load(
        [*bpe_tokens("ab"), *((text, 0.0, CONTROL) for text in marks)], model="gpt2", merges=["a b"], pre="gpt-4o"
    )
    text = "".join(f"{mark}a" for mark in marks)
    ids = own.encode(text, parse_special=True)
    assert own.decode(ids) == "<|start|>a<|channel|>a<|message|>a<|end|>aaaa"
    assert own.decode(ids, skip_special=False) == text
    assert not {own.token_id(mark) for mark in marks} & set(own.encode(text))
