"""Decoding one token at a time: whole characters only, and in all the same text as decoding at once."""

from __future__ import annotations

import random

import pytest
from vocabulary_files import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, tokenizer

from trichord.tokenizers.detokenizer import Detokenizer

PIECES = {
    0: b"",
    1: b" a",
    2: "é".encode()[:1],
    3: "é".encode()[1:],
    4: "😀".encode()[:2],
    5: "😀".encode()[2:],
    6: b"  b",
}


@pytest.mark.parametrize(
    ("tokens", "pieces", "rest"),
    [
        ([1, 1], [" a", " a"], ""),
        ([2, 3], ["", "é"], ""),
        ([4, 5], ["", "😀"], ""),
        ([4, 0, 5], ["", "", "😀"], ""),
        ([4, 1], ["", "\ufffd a"], ""),  # begun, never completed
        ([3], ["\ufffd"], ""),
        ([1, 4], [" a", ""], "\ufffd"),
        ([2], [""], "\ufffd"),
        ([], [], ""),
    ],
)
def test_characters_come_whole(tokens: list[int], pieces: list[str], rest: str) -> None:
    detokenizer = Detokenizer(PIECES.__getitem__)
    assert [detokenizer.add(token) for token in tokens] == pieces
    assert detokenizer.finish() == rest


@pytest.mark.parametrize(
    ("tokens", "text"),
    [([1, 1], "a a"), ([6], " b"), ([0, 1], "a"), ([2, 3, 1], "é a"), ([0, 0], ""), ([3, 1], "\ufffd a")],
)
def test_the_first_space_is_left_out(tokens: list[int], text: str) -> None:
    detokenizer = Detokenizer(PIECES.__getitem__, drop_first_space=True)
    assert "".join(map(detokenizer.add, tokens)) == text


@pytest.mark.parametrize("skip_special", [True, False])
@pytest.mark.parametrize("continues", [True, False])
@pytest.mark.parametrize("name", ["llama-spm", "gpt-2", "llama-bpe", "deepseek-coder"])
def test_in_all_it_is_what_decode_gives(name: str, skip_special: bool, continues: bool) -> None:
    own = tokenizer(name)
    draw = random.Random(name)
    odd = [token for token in range(2000) if "\ufffd" in own.token_bytes(token).decode("utf-8", "replace")]
    for _ in range(200):
        ids = [draw.choice([draw.randrange(own.n_vocab), draw.choice(odd)]) for _ in range(draw.randrange(12))]
        detokenizer = own.detokenizer(skip_special, continues)
        text = "".join(map(detokenizer.add, ids)) + detokenizer.finish()
        assert text == own.decode(ids, skip_special, continues)


ODD_TOKENS = [
    ("<unk>", 0.0, UNKNOWN),
    ("<s>", 0.0, CONTROL),
    ("</s>", 0.0, CONTROL),
    *((f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)),
    *(
        (text, -1.0, NORMAL)
        for text in ["▁a", "Ġb", "Ã", "ð", "Ł", "ĺ", "\\xf0", "\\x9f\\x98", " c", "é", "\ue000", "a", "b", "ab"]
    ),
    ("<tag>", -1.0, USER_DEFINED),
    ("", 0.0, NORMAL),
]


@pytest.mark.parametrize("skip_special", [True, False])
@pytest.mark.parametrize(
    "model", ["llama", "gpt2", "gemma4", "whitespace", "hybriddna", "t5", "plamo2", "rwkv", "bert"]
)
def test_any_ids_of_any_kind(load, model: str, skip_special: bool) -> None:
    own = load(ODD_TOKENS, model=model, merges=["a b"], pre="gpt-2")
    draw = random.Random(model)
    for _ in range(100):
        ids = [draw.randrange(own.n_vocab) for _ in range(draw.randrange(20))]
        detokenizer = own.detokenizer(skip_special)
        pieces = [*map(detokenizer.add, ids), detokenizer.finish()]
        assert "".join(pieces) == own.decode(ids, skip_special)
        # A character that is cut off mid-way comes only when its bytes are known to be none.
        whole = b"".join(own.token_bytes(token) for token in ids).decode("utf-8", "replace")
        assert skip_special or own.decode(ids, False, continues=True) == whole


@pytest.mark.parametrize(
    ("ids", "arguments", "text"),
    [
        ([1, 15043, 3186], {}, "Hello world"),
        ([15043, 3186], {}, "Hello world"),
        ([15043, 3186], {"continues": True}, " Hello world"),
        ([1, 15043, 3186, 2], {"skip_special": False}, "<s> Hello world</s>"),
        ([1, 2, 15043], {}, "Hello"),
        ([0], {}, ""),
        ([0], {"skip_special": False}, "<unk>"),
        ([243, 162, 155, 131], {}, "😀"),
        ([243, 162], {}, "\ufffd"),
        ([], {}, ""),
    ],
)
def test_llama_worked_out_by_hand(ids: list[int], arguments: dict, text: str) -> None:
    assert tokenizer("llama-spm").decode(ids, **arguments) == text


def test_token_bytes_and_pieces() -> None:
    llama, gpt2 = tokenizer("llama-spm"), tokenizer("gpt-2")
    assert (llama.piece(15043), llama.token_bytes(15043)) == ("▁Hello", b" Hello")
    assert (llama.piece(13), llama.token_bytes(13)) == ("<0x0A>", b"\n")
    assert (llama.piece(2), llama.token_bytes(2)) == ("</s>", b"</s>")
    assert (gpt2.piece(15496), gpt2.token_bytes(15496)) == ("Hello", b"Hello")
    assert (gpt2.piece(995), gpt2.token_bytes(995)) == ("Ġworld", b" world")
    assert (gpt2.piece(198), gpt2.token_bytes(198)) == ("Ċ", b"\n")
    assert gpt2.token_bytes(50256) == b"<|endoftext|>"
    assert gpt2.decode([50256]) == ""
