"""RWKV's tokenizer: the longest token at each place, of tokens that are strings of bytes."""

from __future__ import annotations

import random

import pytest
from vocabulary_files import CONTROL, NORMAL, random_text


def escaped(token: bytes) -> str:
    return repr(token)[2:-1]


def rows(tokens: list[bytes]) -> list[tuple[str, float, int]]:
    return [("<s>", 0.0, CONTROL), *((escaped(token), 0.0, NORMAL) for token in tokens)]


def longest_first(data: bytes, tokens: list[bytes]) -> list[int]:
    ids, start = [], 0
    while start < len(data):
        token = max((token for token in tokens if data.startswith(token, start)), key=len)
        ids.append(1 + tokens.index(token))
        start += len(token)
    return ids


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_token_wins(load, seed: int) -> None:
    draw = random.Random(seed)
    bytes_of_text = random_text(draw, 300).encode()
    starts = (draw.randrange(len(bytes_of_text)) for _ in range(300))
    longer = {bytes_of_text[start : start + draw.randint(2, 9)] for start in starts}
    tokens = [bytes([byte]) for byte in range(256)] + sorted(token for token in longer if len(token) > 1)
    own = load(rows(tokens), model="rwkv")
    for text in (bytes_of_text.decode(), random_text(draw, 100), "a\0b\\n'\"", ""):
        ids = own.encode(text)
        assert ids == longest_first(text.encode(), tokens)
        assert own.decode(ids) == text


@pytest.mark.parametrize(
    ("written", "data"),
    [
        ("\\n", b"\n"),
        ("\\t\\r", b"\t\r"),
        ("\\\\n", b"\\n"),
        ("\\'", b"'"),
        ("\\xe4\\xBD\\xa0", "你".encode()),
        ("é", "é".encode()),
        ("\\xzz", b"\\xzz"),  # no escape
        ("a\\", b"a\\"),
    ],
)
def test_escapes(load, written: str, data: bytes) -> None:
    own = load([("<s>", 0.0, CONTROL), (written, 0.0, NORMAL)], model="rwkv")
    assert own.token_bytes(1) == data
    assert own.encode(data.decode()) == [1]


def test_what_is_no_token(load) -> None:
    tokens = rows([b"a", b"abcd"])
    assert load(tokens, model="rwkv").encode("abca<s>") == [1, 1]
    assert load(tokens, model="rwkv", unknown_token_id=0).encode("abca") == [1, 0, 0, 1]
    assert load(tokens, model="rwkv").encode("a<s>", parse_special=True) == [1, 0]


def test_a_text_has_no_marks_unless_the_file_names_some(load) -> None:
    tokens = rows([b"a"])
    assert load(tokens, model="rwkv", bos_token_id=0).encode("a") == [1]
    assert load(tokens, model="rwkv", bos_token_id=0, add_bos_token=True).encode("a") == [0, 1]
