"""Tokenizers that take the best way through a text, against a plain search; and SentencePiece's character maps."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
from tokenizers import normalizers
from vocabulary_files import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, random_text

from trichord.errors import TokenizerError
from trichord.tokenizers.charsmap import Charsmap

T5_TOKENS = [
    ("<pad>", 0.0, CONTROL),
    ("</s>", 0.0, CONTROL),
    ("<unk>", 0.0, UNKNOWN),
    *((character, -8.0 - index / 4, NORMAL) for index, character in enumerate("▁abcdeé日😀.")),
]
BYTES = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]


def best_way(text: str, ids: dict[str, int], scores: dict[str, float], unknown: int) -> list[int]:
    """Viterbi's algorithm, from the left, in float64; unknown characters side by side are one."""
    penalty = min(scores.values()) - 10
    best: list[tuple[float, int, int] | None] = [(0.0, 0, unknown)] + [None] * len(text)
    for start in range(len(text)):
        ways = {end: (ids[text[start:end]], scores[text[start:end]]) for end in ends(text, start, ids)}
        if start + 1 not in ways:
            ways[start + 1] = (unknown, penalty)
        for end, (token, score) in ways.items():
            total = best[start][0] + score
            if best[end] is None or total > best[end][0]:
                best[end] = (total, start, token)
    found, end = [], len(text)
    while end:
        _, end, token = best[end]
        if not (token == unknown and found and found[-1] == unknown):
            found.append(token)
    return found[::-1]


def ends(text: str, start: int, ids: dict[str, int]) -> list[int]:
    return [end for end in range(start + 1, len(text) + 1) if text[start:end] in ids]


def random_tokens(draw: random.Random, letters: str, scores: list[float]) -> list[tuple[str, float, int]]:
    pieces = {"".join(draw.choices(letters, k=draw.randint(2, 5))) for _ in range(60)}
    return [(piece, draw.choice(scores), NORMAL) for piece in sorted(pieces)]


@pytest.mark.parametrize("seed", range(30))
def test_unigram_takes_the_best_way(load, seed: int) -> None:
    draw = random.Random(seed)
    # Few scores make many ties, any scores sums that round.
    scores = [-1.0, -2.0, -3.0] if seed % 2 else [-draw.random() * 10 for _ in range(50)]
    tokens = [*T5_TOKENS, *random_tokens(draw, "▁abcdé", scores)]
    own = load(tokens, model="t5", add_space_prefix=bool(seed % 3))
    normal = {text: (token, np.float32(score)) for token, (text, score, kind) in enumerate(tokens) if kind == NORMAL}
    ids = {text: token for text, (token, _) in normal.items()}
    as_float = {text: float(score) for text, (_, score) in normal.items()}
    for _ in range(20):
        text = "".join(draw.choices(" abcdéxy日", k=draw.randint(1, 40)))
        written = (" " * bool(seed % 3) + text).replace(" ", "▁")
        assert own.encode(text, add_special=False) == best_way(written, ids, as_float, 2), text


@pytest.mark.parametrize(
    ("keys", "text", "pieces"),
    [
        ({}, "ab", ["a", "b"]),
        ({"add_space_prefix": True}, "ab", ["▁", "a", "b"]),
        ({"add_space_prefix": True}, "", []),
        ({"add_space_prefix": True}, "  a", ["▁", "▁", "▁", "a"]),
        ({"add_space_prefix": True, "remove_extra_whitespaces": True}, "  a   b ", ["▁", "a", "▁", "b"]),
        ({"add_space_prefix": True, "remove_extra_whitespaces": True}, "   ", []),
        ({"remove_extra_whitespaces": True}, "  a   b ", ["a", "▁", "b"]),
        ({}, "axyb", ["a", "<unk>", "b"]),
        ({"add_space_prefix": True}, "a<x>b", ["▁", "a", "<x>", "▁", "b"]),  # each piece of text is a text
        ({}, "a</s>", ["a", "<unk>"]),
    ],
)
def test_spaces_and_unknowns(load, keys: dict, text: str, pieces: list[str]) -> None:
    own = load([*T5_TOKENS, ("<x>", 0.0, USER_DEFINED), ("zz", -1000.0, UNUSED)], model="t5", **keys)
    assert [own.piece(token) for token in own.encode(text, add_special=False)] == pieces


def test_unigram_begins_and_ends_texts_as_t5(load) -> None:
    own = load(T5_TOKENS, model="t5", add_space_prefix=True)
    assert own.encode("a") == [*own.encode("a", add_special=False), 1]
    assert own.decode(own.encode("ab a")) == "ab a"
    assert own.encode("a</s>", add_special=False, parse_special=True)[-1] == 1


def test_bytes_stand_in_where_there_are_byte_tokens(load) -> None:
    own = load([*T5_TOKENS, *BYTES], model="t5")
    text = random_text(random.Random(0), 200).replace("▁", "")
    assert own.decode(own.encode(text)) == text
    assert 2 not in own.encode(text)


@pytest.mark.parametrize("model", ["t5", "plamo2", "rwkv", "bert"])
def test_megabytes(load, model: str) -> None:
    own = load([*T5_TOKENS, ("abc", -1.0, NORMAL), ("a" * 50, -1.0, NORMAL), *BYTES], model=model, unknown_token_id=2)
    for text in ["abc" * 100_000, "a" * 300_000, "ab cd " * 50_000, "x" * 300_000]:
        ids = own.encode(text, add_special=False)
        assert len(ids) <= len(text) and (model in ("bert", "rwkv") or own.decode(ids) == text)


# PLaMo 2


def best_way_from_the_end(text: str, scores: dict[str, int], unknown: int) -> list[str]:
    """The least cost from each place to the end; of equal ones that with the longest token first."""
    cost, step = [0] * (len(text) + 1), [1] * len(text)
    for start in reversed(range(len(text))):
        ways = [(scores[text[start:end]], end) for end in reversed(ends(text, start, scores))] + [(unknown, start + 1)]
        cost[start] = 1 << 60
        for score, end in ways:
            if cost[end] - score < cost[start]:
                cost[start], step[start] = cost[end] - score, end - start
    pieces, start = [], 0
    while start < len(text):
        pieces.append(text[start : start + step[start]])
        start += step[start]
    return pieces


@pytest.mark.parametrize("seed", range(20))
def test_plamo2_takes_the_best_way(load, seed: int) -> None:
    draw = random.Random(seed)
    singles = [(character, -8.0, NORMAL) for character in " abcd日"]
    tokens = [("<unk>", 0.0, UNKNOWN), *BYTES, *singles, *random_tokens(draw, " abcd", [-1.0, -2.00005, -3.0])]
    own = load(tokens, model="plamo2")
    ids = {text: token for token, (text, _, _) in enumerate(tokens)}
    scores = {text: round(float(np.float32(score)) * 1e4) for text, score, kind in tokens if kind == NORMAL}
    for _ in range(20):
        text = "".join(draw.choices(" abcdé日", k=draw.randint(1, 40)))
        expected = []
        for piece in best_way_from_the_end(text, scores, -10_000_000):
            expected += [ids[piece]] if piece in scores else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
        assert own.encode(text, add_special=False) == expected, text
        assert own.decode(expected) == text
    assert own.encode("\ufeffa") == own.encode("a") == [ids["a"]]


# Character maps


def double_array(replacements: dict[str, str], draw: random.Random) -> bytes:
    """Packs a map as darts-clone does, with places taken at random."""
    texts, starts = b"", {}
    for key, value in replacements.items():
        starts[key.encode()] = len(texts)
        texts += value.encode() + b"\0"
    units, bases = {0: 0}, set()

    def place(unit: int, prefix: bytes) -> None:
        labels = sorted({key[len(prefix)] for key in starts if key.startswith(prefix) and len(key) > len(prefix)})
        slots = [0, *labels] if prefix in starts else labels
        drawn = iter(lambda: draw.randrange(1, 1 << 13), 0)
        base = next(base for base in drawn if base not in bases and all(base ^ slot not in units for slot in slots))
        bases.add(base)
        offset = unit ^ base
        units[unit] |= (offset >> 8 << 10 | 1 << 9) if offset % 256 == 0 else offset << 10
        if prefix in starts:
            units[unit] |= 1 << 8
            units[base] = 1 << 31 | starts[prefix]
        for label in labels:
            units[base ^ label] = label
        for label in labels:
            place(base ^ label, prefix + bytes([label]))

    place(0, b"")
    array = [units.get(index, 0) for index in range(1 << 13)]
    return struct.pack(f"<I{len(array)}I", 4 * len(array), *array) + texts


def replaced_slowly(text: str, replacements: dict[str, str]) -> str:
    out, start = "", 0
    while start < len(text):
        keys = [key for key in replacements if text.startswith(key, start)]
        key = max(keys, key=len, default="")
        out += replacements[key] if key else text[start]
        start += len(key) or 1
    return out


SINGLE = {"ﬁ": "fi", "Ａ": "A", "\t": " ", "\x01": "", "\u3000": " ", "é": "e\u0301", "日": "月", "😀": ":)", "x": "ks"}
PAIRS = {
    "e\u0301": "é",
    "e\u0301\u0302": "ế",
    "ab": "c",
    "abc": "",
    "bca": "a",
    "xx": "y",
    "か\u3099": "が",
    "x]": "^-",
}


@pytest.mark.parametrize("seed", range(10))
def test_the_longest_key_is_replaced(seed: int) -> None:
    draw = random.Random(seed)
    charsmap = Charsmap(double_array(SINGLE | PAIRS, draw), "model.gguf")
    for _ in range(50):
        text = "".join(draw.choices([*SINGLE, *PAIRS, *"abce\u0301z か^-]"], k=draw.randint(0, 20)))
        assert charsmap.normalize(text) == replaced_slowly(text, SINGLE | PAIRS), ascii(text)


def test_keys_of_one_character_like_the_tokenizers_library() -> None:
    data = double_array(SINGLE, random.Random(0))
    text = "ﬁＡ\t\x01 \u3000é日😀xyz"
    assert Charsmap(data, "model.gguf").normalize(text) == normalizers.Precompiled(data).normalize_str(text)


def test_a_character_map_in_a_file(load) -> None:
    data = double_array(SINGLE | PAIRS, random.Random(0))
    own = load(T5_TOKENS, model="t5", precompiled_charsmap=data, remove_extra_whitespaces=True)
    pieces = [own.piece(token) for token in own.encode("\u3000a\t\x01 e\u0301\u3000", add_special=False)]
    assert pieces == ["a", "▁", "é"]


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_character_map_is_refused_or_harmless(seed: int) -> None:
    draw = random.Random(seed)
    good = double_array(SINGLE | PAIRS, draw)
    damaged = bytearray(good)
    for _ in range(draw.choice([1, 30, 3000])):
        damaged[draw.randrange(4, len(damaged))] = draw.randrange(256)
    for data in (bytes(damaged), good[: draw.randrange(len(good))], draw.randbytes(draw.randrange(2000)), b""):
        try:
            charsmap = Charsmap(data, "model.gguf")
        except TokenizerError as error:
            assert str(error) == "model.gguf: metadata key 'tokenizer.ggml.precompiled_charsmap' is damaged"
        else:
            assert isinstance(charsmap.normalize("".join([*SINGLE, *PAIRS])), str)


@pytest.mark.parametrize(
    ("units", "texts"),
    [
        ([1 << 10 | 0, (ord("a") ^ 1 ^ 1) << 10 | ord("a")], b"\0"),  # no end to the keys, or none
        ([ord("a") ^ 1 << 10] + [ord("a")] * 300, b""),
        ([0] * 4, b"x" * 1000),
    ],
)
def test_hostile_character_maps_end(units: list[int], texts: bytes) -> None:
    data = struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + texts
    try:
        Charsmap(data, "model.gguf").normalize("aaa")
    except TokenizerError as error:
        assert "is damaged" in str(error)


def test_a_chain_without_end_is_refused() -> None:
    # Unit 1 is the root's child by the letter \x01, and its own: its children are where it is.
    units = [0 << 10, (1 ^ 0) << 10 | 1]
    with pytest.raises(TokenizerError, match="is damaged"):
        Charsmap(struct.pack("<I2I", 8, *units), "model.gguf")


@pytest.mark.parametrize(
    ("tokens", "keys", "says"),
    [
        (T5_TOKENS, {"model": "t5", "scores": None}, "'tokenizer.ggml.scores' is missing"),
        (T5_TOKENS, {"model": "plamo2", "scores": None}, "'tokenizer.ggml.scores' is missing"),
        (T5_TOKENS[:3], {"model": "t5"}, "has no normal tokens"),
        ([*T5_TOKENS, (b"\xff", -1.0, NORMAL)], {"model": "t5"}, "not valid UTF-8"),
        ([*T5_TOKENS, (b"\xff", -1.0, NORMAL)], {"model": "plamo2"}, "not valid UTF-8"),
        (T5_TOKENS, {"model": "t5", "precompiled_charsmap": "abc"}, "precompiled_charsmap"),
        (T5_TOKENS, {"model": "t5", "precompiled_charsmap": ["a"]}, "is not an array of bytes"),
        (T5_TOKENS, {"model": "t5", "precompiled_charsmap": [1, 2]}, "is not an array of bytes"),
        (T5_TOKENS, {"model": "t5", "precompiled_charsmap": b"abc"}, "is damaged"),
        (T5_TOKENS, {"model": "t5", "add_space_prefix": 1}, "tokenizer.ggml.add_space_prefix"),
    ],
)
def test_unusable_vocabularies(load, tokens: list, keys: dict, says: str) -> None:
    with pytest.raises(TokenizerError, match=says) as caught:
        load(tokens, **keys)
    assert str(caught.value).startswith("model.gguf: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("score", [float("inf"), float("-inf"), 3e38, -3e38, 5.0])
@pytest.mark.parametrize("model", ["t5", "plamo2", "llama"])
def test_odd_scores_do_no_harm(load, model: str, score: float) -> None:
    own = load([*T5_TOKENS, *BYTES, ("ab", score, NORMAL), ("bc", -1.0, NORMAL)], model=model, add_space_prefix=False)
    assert own.decode(own.encode("abcabxc", add_special=False)) == "abcabxc"
