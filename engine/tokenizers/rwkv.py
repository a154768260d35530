r"""RWKV's "world" tokenizer (`tokenizer.ggml.model` "rwkv"): at each place of a text the longest token there.

Tokens are strings of bytes, written like Python's: `\n`, `\'`, `\xe4`. A backslash that begins no such escape stands
for itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from trichord.tokenizers.longest_match import LongestMatch
from trichord.tokenizers.vocabulary import TokenType, Vocabulary

if TYPE_CHECKING:
    from trichord.gguf_file import GGUFFile

_ESCAPE = re.compile(rb"\\(?:x([0-9A-Fa-f]{2})|([^x]))", re.DOTALL)
_CONTROL = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}


class RWKV:
    """Encodes text and gives the bytes of normal tokens, by one file's vocabulary."""

    adds_bos = adds_eos = adds_space = insists_on_bos = False

    @staticmethod
    def default_ids(file: GGUFFile) -> Mapping[str, int]:
        """None: a text has no marks unless the file names some."""
        return {}

    def __init__(self, vocabulary: Vocabulary, file: GGUFFile) -> None:
        ids = vocabulary.ids_of(TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED, TokenType.UNDEFINED)
        self._ids = {_unescaped(text).decode("latin-1"): token for text, token in ids.items()}
        self._longest = LongestMatch(self._ids)
        self._unknown = [] if vocabulary.unk_id is None else [vocabulary.unk_id]

    def encode(self, text: str, after_special: bool) -> list[int]:
        """The ids of a piece of text that has no special tokens in it; bytes that are no token become the unknown."""
        data = text.encode().decode("latin-1")  # a character for each byte
        ids: list[int] = []
        start = 0
        while start < len(data):
            end = self._longest.end(data, start, len(data))
            if end == start:
                ids += self._unknown
                end += 1
            else:
                ids.append(self._ids[data[start:end]])
            start = end
        return ids

    def bytes_of(self, text: str) -> bytes:
        """The bytes that a normal token of this text stands for."""
        return _unescaped(text)


def _unescaped(text: str) -> bytes:
    return _ESCAPE.sub(_byte, text.encode("utf-8", "surrogateescape"))


def _byte(escape: re.Match[bytes]) -> bytes:
    return bytes.fromhex(escape[1].decode()) if escape[1] else _CONTROL.get(escape[2], escape[2])
