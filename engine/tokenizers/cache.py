"""Words recur: each one's ids are worked out once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain

MAX_WORDS = 1 << 17
MAX_LENGTH = 64  # of a word that is kept, in characters


class WordCache(dict[str, list[int]]):
    """Word to ids, filled in by `encode_word` as words turn up; bounded, and safe to share between threads."""

    def __init__(self, encode_word: Callable[[str], list[int]]) -> None:
        self._encode_word = encode_word

    def __missing__(self, word: str) -> list[int]:
        ids = self._encode_word(word)
        if len(word) <= MAX_LENGTH:
            if len(self) >= MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids

    def encode(self, words: Iterable[str]) -> list[int]:
        """The ids of these words, one after the other."""
        return list(chain.from_iterable(map(self.__getitem__, words)))
