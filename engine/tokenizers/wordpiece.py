"""WordPiece (`tokenizer.ggml.model` "bert"): BERT and the embedding models after it.

A text is cut at white space and around punctuation and Chinese characters; each word is taken apart from the left
into the longest tokens there are. A token that begins a word is written with U+2581 before it, one that carries a
word on as it is (the `##` of BERT's own files is gone). Case and accents are lost, so decoding gives a likeness.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING

from trichord.tokenizers.cache import WordCache
from trichord.tokenizers.longest_match import LongestMatch
from trichord.tokenizers.vocabulary import SPACE, TokenType, Vocabulary

if TYPE_CHECKING:
    from trichord.gguf_file import GGUFFile

# What counts as Chinese to BERT, the odd 2B920 included:
# https://github.com/huggingface/tokenizers/blob/main/tokenizers/src/normalizers/bert.rs
_CHINESE = (
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F)),
    *((0x2B740, 0x2B81F), (0x2B920, 0x2CEAF), (0x2F800, 0x2FA1F)),
)


class WordPiece:
    """Encodes text and gives the bytes of normal tokens, by one file's vocabulary."""

    adds_bos = adds_eos = adds_space = True
    insists_on_bos = False

    @staticmethod
    def default_ids(file: GGUFFile) -> Mapping[str, int]:
        """A text stands between [CLS] and [SEP]. The file's spelling of the latter's key is this one."""
        separator = file.get("tokenizer.ggml.seperator_token_id", int, 102)
        return {"unknown": 100, "bos": 101, "eos": separator}

    def __init__(self, vocabulary: Vocabulary, file: GGUFFile) -> None:
        lowercase = file.get("tokenizer.ggml.normalizer.lowercase", bool, True)
        self._strip_accents = file.get("tokenizer.ggml.normalizer.strip_accents", bool, lowercase)
        self._spread = _Spread(lowercase, self._strip_accents)
        self._ids = vocabulary.ids_of(TokenType.NORMAL, TokenType.USER_DEFINED)
        self._longest = LongestMatch(self._ids)
        self._unknown = [] if vocabulary.unk_id is None else [vocabulary.unk_id]
        self._words = WordCache(self._encode_word)

    def encode(self, text: str, after_special: bool) -> list[int]:
        """The ids of a piece of text that has no special tokens in it."""
        if self._strip_accents:
            text = unicodedata.normalize("NFD", text)
        return self._words.encode(filter(None, text.translate(self._spread).split(" ")))

    def bytes_of(self, text: str) -> bytes:
        """The bytes that a normal token of this text stands for."""
        return text.replace(SPACE, " ").encode("utf-8", "surrogateescape")

    def _encode_word(self, word: str) -> list[int]:
        text = SPACE + word
        ids: list[int] = []
        start = 0
        while start < len(text):
            end = self._longest.end(text, start, len(text))
            if end == start:
                return self._unknown
            ids.append(self._ids[text[start:end]])
            start = end
        return ids


class _Spread(dict[int, str]):
    """A table for `str.translate`, filled in as characters turn up: spaces around what is a word by itself."""

    def __init__(self, lowercase: bool, strip_accents: bool) -> None:
        self._lowercase = lowercase
        self._strip_accents = strip_accents

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if category[0] == "Z" or character in "\t\n\r":
            spread = " "
        elif category in ("Cc", "Cf", "Cs", "Co") or code == 0xFFFD or (self._strip_accents and category == "Mn"):
            spread = ""
        elif category[0] == "P" or (code < 0x80 and category[0] == "S") or _is_chinese(code):
            spread = f" {character} "
        else:
            spread = character.lower() if self._lowercase else character
        self[code] = spread
        return spread


def _is_chinese(code: int) -> bool:
    return any(first <= code <= last for first, last in _CHINESE)
