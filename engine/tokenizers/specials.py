"""Finding the tokens that stand for themselves in a text, before anything else is done to it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from heapq import heapify, heappop, heappush

_SPACES = " \t\n\v\f\r"


class SpecialTokens:
    """Splits a text at the tokens given: `ids` maps each one's text to its id.

    Of tokens that overlap in a text the longest in UTF-8 bytes wins, of equally long ones the lower id, then the
    leftmost place; that is what searching for one token after the other, longest first, comes to. The white space
    that follows a token of `swallows_space` goes with it.
    """

    def __init__(self, ids: Mapping[str, int], swallows_space: Collection[int] = ()) -> None:
        self._ids = ids
        self._swallows_space = swallows_space
        # A token's first two characters say which lengths can match at a place, mostly one or two.
        lengths: dict[str, set[int]] = defaultdict(set)
        for text in ids:
            lengths[text[:2]].add(len(text))
        for start in lengths:
            if start[0] in ids:
                lengths[start].add(1)
        self._lengths = {start: sorted(of_start, reverse=True) for start, of_start in lengths.items()}
        starts = sorted(lengths, key=len, reverse=True)
        self._start = re.compile("|".join(map(re.escape, starts)))

    def split(self, text: str) -> Iterator[str | int]:
        """The text in order: an id for each token found, and the pieces of text between them, none empty."""
        position, swallow = 0, False
        for start, end, token in [*self._find(text), (len(text), len(text), None)]:
            piece = text[position:start].lstrip(_SPACES) if swallow else text[position:start]
            if piece:
                yield piece
            if token is not None:
                yield token
            position, swallow = end, token in self._swallows_space

    def _find(self, text: str) -> list[tuple[int, int, int]]:
        """(start, end, id) of each token that counts, in order."""
        candidates = []
        place = self._start.search(text) if self._ids else None
        while place:
            candidate = self._longest_at(text, place.start(), len(text))
            if candidate:
                candidates.append(candidate)
            place = self._start.search(text, place.start() + 1)
        heapify(candidates)
        found, taken = [], bytearray(len(text) if candidates else 0)
        while candidates:
            _, token, start, end = heappop(candidates)
            blocked = taken.find(1, start, end)
            if blocked < 0:
                taken[start:end] = b"\1" * (end - start)
                found.append((start, end, token))
            elif blocked > start:
                shorter = self._longest_at(text, start, blocked)
                if shorter:
                    heappush(candidates, shorter)
        return sorted(found)

    def _longest_at(self, text: str, start: int, limit: int) -> tuple[int, int, int, int] | None:
        """The longest token at `start` that ends by `limit`, as (minus its bytes, id, start, end): best is least."""
        lengths = self._lengths.get(text[start : start + 2]) or self._lengths.get(text[start], ())
        for length in lengths:
            end = start + length
            piece = text[start:end]
            token = self._ids.get(piece) if end <= limit else None
            if token is not None:
                return -len(piece.encode("utf-8", "surrogateescape")), token, start, end
        return None
