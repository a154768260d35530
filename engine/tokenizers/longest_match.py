"""Finding the longest of many texts that stands at a place of another one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection


class LongestMatch:
    """Looks up which of `texts` stands at a place; none of them is empty.

    A text's first two characters say which lengths are worth a look, mostly one or two of them.
    """

    def __init__(self, texts: Collection[str]) -> None:
        self._texts = texts
        lengths: dict[str, set[int]] = defaultdict(set)
        for text in texts:
            lengths[text[:2]].add(len(text))
        for start in lengths:
            if start[0] in texts:
                lengths[start].add(1)
        self._lengths = {start: sorted(of_start, reverse=True) for start, of_start in lengths.items()}

    @property
    def starts(self) -> list[str]:
        """One or two characters that each of the texts begins with, the longer first."""
        return sorted(self._lengths, key=len, reverse=True)

    def end(self, text: str, start: int, limit: int) -> int:
        """Where the longest match at `start` that ends by `limit` ends; `start` itself where there is none."""
        lengths = self._lengths.get(text[start : start + 2]) or self._lengths.get(text[start : start + 1], ())
        for length in lengths:
            end = start + length
            if end <= limit and text[start:end] in self._texts:
                return end
        return start
