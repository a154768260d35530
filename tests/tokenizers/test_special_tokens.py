"""Special tokens in a text, and those that begin and end it."""

from __future__ import annotations

import random

import pytest
from vocabulary_files import CONTROL, NORMAL, SPM_TOKENS, USER_DEFINED, bpe_tokens, tokenizer

from trichord.tokenizers.specials import SpecialTokens


def test_control_tokens_only_when_asked_for() -> None:
    own = tokenizer("llama-bpe")
    text = "<|begin_of_text|>Hi<|eot_id|>"
    assert own.encode(text, add_special=False, parse_special=True) == [128000, 13347, 128009]
    plain = own.encode(text, add_special=False)
    assert not {128000, 128009} & set(plain)
    assert own.decode(plain) == text
    assert own.decode([128000, 13347, 128009]) == "Hi"
    assert own.decode([128000, 13347, 128009], skip_special=False) == text


@pytest.mark.parametrize("model", ["gpt2", "gemma4"])
def test_merges_make_no_control_tokens(load, model: str) -> None:
    marks = [("<s>", 0.0, CONTROL), ("x", 0.0, CONTROL), ("!!", 0.0, CONTROL)]
    plain = [(text, 0.0, NORMAL) for text in ["<", "s", ">", "a", "!", "<s", "!!a", "aa"]]
    own = load([*plain, *marks], model=model, pre="superbpe", merges=["< s", "<s >", "! !", "!! a", "a a"])
    assert [own.piece(token) for token in own.encode("<s>")] == ["<s", ">"]
    assert [own.piece(token) for token in own.encode("!!aax")] == ["!", "!", "aa"]
    assert [own.piece(token) for token in own.encode("<s>!!", parse_special=True)] == ["<s>", "!!"]


def test_user_defined_tokens_always(load) -> None:
    own = load([*SPM_TOKENS, ("<tag>", -1.0, USER_DEFINED), ("  ", -1.0, USER_DEFINED)])
    pieces = [own.piece(token) for token in own.encode("a<tag>b   c", add_special=False)]
    # A text after a special token gets the space that the start of a text gets.
    assert pieces == ["▁", "a", "<tag>", "▁", "b", "  ", "▁", "▁", "c"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("abcd", ["a", 1]),  # the longest wins, although another starts before it
        ("abc", [0, "c"]),
        ("abab", [0, 0]),
        ("xyzw", [3]),
        ("xyz", [2, "z"]),
        ("éab", [4, "b"]),  # three bytes beat two
        ("q", [5]),
        ("aqa", ["a", 5, "a"]),
        ("", []),
    ],
)
def test_which_special_token_wins(text: str, found: list[str | int]) -> None:
    ids = {token: index for index, token in enumerate(["ab", "bcd", "xy", "xyzw", "éa", "q"])}
    assert list(SpecialTokens(ids).split(text)) == found


@pytest.mark.parametrize("seed", range(50))
def test_special_tokens_as_if_searched_one_after_the_other(seed: int) -> None:
    draw = random.Random(seed)
    texts = sorted({"".join(draw.choices("abé ", k=draw.randint(1, 6))) for _ in range(draw.randint(1, 12))})
    ids = {text: index for index, text in enumerate(texts)}
    for _ in range(20):
        text = "".join(draw.choices("abé c", k=draw.randint(0, 30)))
        pieces: list[str | int] = [text]
        for token in sorted(texts, key=lambda token: (-len(token.encode()), ids[token])):
            pieces = [part for piece in pieces for part in searched(piece, token, ids[token])]
        assert list(SpecialTokens(ids).split(text)) == [piece for piece in pieces if piece != ""]


def searched(piece: str | int, token: str, number: int) -> list[str | int]:
    if isinstance(piece, int):
        return [piece]
    parts: list[str | int] = []
    for part in piece.split(token):
        parts += [part, number]
    return parts[:-1]


def test_phi3_swallows_space_after_its_marks() -> None:
    own = tokenizer("phi-3")
    user, end = own.token_id("<|user|>"), own.token_id("<|end|>")
    ids = own.encode("<s><|user|>\n Hi<|end|>\n", add_special=False, parse_special=True)
    assert ids == [1, user, *own.encode("Hi", add_special=False), end]


# Beginnings and ends


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [1, "a"]),  # Llama's own ids, and a beginning, where the file says nothing
        ({"bos_token_id": 7, "eos_token_id": 8}, [7, "a"]),
        ({"add_bos_token": False}, ["a"]),
        ({"add_eos_token": True}, [1, "a", 2]),
        ({"add_bos_token": False, "add_eos_token": True, "eos_token_id": 9}, ["a", 9]),
        ({"bos_token_id": 0xFFFFFFFF}, ["a"]),  # -1: no such token
    ],
)
def test_what_begins_and_ends_a_text(load, keys: dict, expected: list) -> None:
    own = load(SPM_TOKENS, add_space_prefix=False, **keys)
    ids = [own.token_id(item) if isinstance(item, str) else item for item in expected]
    assert own.encode("a") == ids
    assert own.encode("a", add_special=False) == [own.token_id("a")]
    assert own.encode("") == [token for token in ids if token != own.token_id("a")]


@pytest.mark.parametrize(
    ("pre", "keys", "begins"),
    [
        ("gpt-2", {"bos_token_id": 3}, False),
        ("gpt-2", {"bos_token_id": 3, "add_bos_token": True}, True),
        ("llama-bpe", {"bos_token_id": 3}, True),
        ("llama-bpe", {}, False),
    ],
)
def test_byte_level_vocabularies_begin_a_text_as_their_pre_tokenizer_says(load, pre, keys, begins) -> None:
    own = load(bpe_tokens("ab"), model="gpt2", merges=["a b"], pre=pre, **keys)
    assert own.encode("ab") == [3] * begins + [own.token_id("ab")]


@pytest.mark.parametrize(
    ("special", "keys", "stops"),
    [
        ({"</s>": CONTROL}, {"eos_token_id": 5}, {"e", "</s>"}),
        ({"<|im_end|>": CONTROL, "<|eot_id|>": CONTROL}, {"eos_token_id": 5}, {"e", "<|im_end|>", "<|eot_id|>"}),
        ({"<|im_end|>": USER_DEFINED}, {"eos_token_id": 5}, {"e", "<|im_end|>"}),
        ({"</s>": NORMAL}, {"eos_token_id": 5}, {"e"}),  # in HTML it ends struck-out text
        ({}, {"eot_token_id": 6, "eom_token_id": 7}, {"f", "g"}),
        ({}, {}, set()),
        # In these vocabularies <|end|> ends a part of an answer.
        ({"<|end|>": CONTROL, "<|return|>": CONTROL, "<|call|>": CONTROL}, {}, {"<|return|>", "<|call|>"}),
        ({"<|end|>": CONTROL, "<|return|>": CONTROL}, {}, {"<|return|>", "<|end|>"}),
    ],
)
def test_stop_ids(load, special: dict[str, int], keys: dict, stops: set[str]) -> None:
    tokens = [(text, 0.0, NORMAL) for text in ["ab", *"abcdefg"]] + [
        (text, 0.0, kind) for text, kind in special.items()
    ]
    # One place further: "ab" is token 0.
    own = load(tokens, model="gpt2", merges=["a b"], pre="gpt-2", **keys)
    assert {own.piece(token) for token in own.stop_ids} == stops


def test_stop_tokens_cannot_be_typed(load) -> None:
    own = load([*bpe_tokens("ab"), ("<|im_end|>", 0.0, USER_DEFINED)], model="gpt2", merges=["a b"], pre="gpt-2")
    assert own.token_id("<|im_end|>") not in own.encode("<|im_end|>")
    assert own.decode([*own.stop_ids]) == ""


@pytest.mark.parametrize(
    ("name", "bos", "eos", "stops"),
    [
        ("llama-spm", 1, 2, {"</s>"}),
        ("phi-3", 1, 32000, {"</s>", "<|endoftext|>", "<|end|>"}),
        ("llama-bpe", 128000, 128001, {"<|end_of_text|>", "<|eot_id|>"}),
        ("qwen2", 151643, 151643, {"<|endoftext|>", "<|im_end|>"}),
    ],
)
def test_ends_of_real_vocabularies(name: str, bos: int, eos: int, stops: set[str]) -> None:
    own = tokenizer(name)
    assert (own.bos_id, own.eos_id) == (bos, eos)
    assert {own.piece(token) for token in own.stop_ids} == stops
