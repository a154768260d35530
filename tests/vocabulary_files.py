"""Small vocabularies as GGUF files, texts that a tokenizer may stumble over, and merging by its definition."""

from __future__ import annotations

import random
from functools import cache
from itertools import pairwise
from pathlib import Path

import gguf
from support import parity

from trichord.gguf_file import GGUFFile
from trichord.tokenizers import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

SPM_TOKENS = [
    ("<unk>", 0.0, UNKNOWN),
    ("<s>", 0.0, CONTROL),
    ("</s>", 0.0, CONTROL),
    *((f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)),
    *((character, -100.0, NORMAL) for character in "▁abcdeé日😀<>/s0x4"),
]


@cache
def tokenizer(name: str) -> Tokenizer:
    """That of a real vocabulary of the parity data."""
    return Tokenizer.from_gguf(GGUFFile(parity(f"tokenizers/ggml-vocab-{name}.gguf")))


def write(path: Path, rows: list[tuple[str, float, int]], model: str = "llama", **keys: object) -> Path:
    """A GGUF file that is only a vocabulary; a key given as None is left out."""
    writer = gguf.GGUFWriter(path, "llama")
    texts, scores, types = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    values = {
        "model": model,
        "tokens": texts,
        "scores": scores if model in ("llama", "t5", "plamo2") else None,
        "token_type": types,
        **keys,
    }
    for key, value in values.items():
        if value is not None and value != []:
            write_key(writer, key if "." in key else f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def write_key(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    kinds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
    kinds.get(type(value), writer.add_array)(key, value)


def bpe_tokens(*more: str) -> list[tuple[str, float, int]]:
    alphabet = [chr(code) for code in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144)]]
    return [(text, 0.0, NORMAL) for text in [*alphabet, *more]]


def random_text(draw: random.Random, length: int) -> str:
    """Words, runs of white space, digits, several scripts, emoji with joiners, control characters, markup."""
    pieces = [
        lambda: "".join(draw.choices("etaoinshrdluETAOINS", k=draw.randint(1, 12))),
        lambda: draw.choice(" \n\t") * draw.choice([1, 1, 1, 2, 3, 4, 5, 8, 15, 16, 17, 33]),
        lambda: str(draw.randrange(10 ** draw.randint(1, 12))),
        lambda: "".join(chr(draw.randrange(0x4E00, 0x9FA5)) for _ in range(draw.randint(1, 6))),
        lambda: "".join(chr(draw.randrange(0x410, 0x450)) for _ in range(draw.randint(1, 9))),
        lambda: "".join(chr(draw.randrange(0x621, 0x64B)) for _ in range(draw.randint(1, 6))),
        lambda: "".join(chr(draw.randrange(0xAC00, 0xD7A3)) for _ in range(draw.randint(1, 4))),
        lambda: draw.choice(
            ["😀", "🦙", "👨‍👩‍👧", "🇫🇮", "é", "e\u0301", "ﬁ", "Ǆ", "½", "Ⅷ", "٣", "𝔘", "\u3000", "\xa0", "\x85"]
        ),
        lambda: draw.choice("\0\x01\x1c\x1f\x7f\u200b\ufeff\ufffd\uffff\U0010ffff"),
        lambda: draw.choice(
            ["'s", "'LL", "'re ", "...", "</s>", "<0x0A>", "<|im_start|>", "http://", "==", "`$^|", "“”", "▁"]
        ),
    ]
    return "".join(draw.choice(pieces)() for _ in range(length))


def merged_by_pairs(text: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Merging by a list of pairs as it is defined: over and over the first in the list, and the leftmost of it."""
    symbols = list(text)
    while True:
        pairs = list(pairwise(symbols))
        best = min((ranks[pair] for pair in pairs if pair in ranks), default=None)
        if best is None:
            return symbols
        place = next(index for index, pair in enumerate(pairs) if ranks.get(pair) == best)
        symbols[place : place + 2] = ["".join(pairs[place])]
