"""Finding the tokens that stand for themselves in a text, before anything else is done to it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from trichord.tokenizers.longest_match import LongestMatch
from trichord.tokenizers.vocabulary import TokenType, Vocabulary

if TYPE_CHECKING:
    from trichord.gguf_file import GGUFFile

_SPACES = " \t\n\v\f\r"


@dataclass(frozen=True)
class SwallowedSpace:
    """The special tokens that take white space `before` or `after` them in a text along."""

    before: frozenset[int] = frozenset()
    after: frozenset[int] = frozenset()

    @classmethod
    def from_gguf(cls, file: GGUFFile, vocabulary: Vocabulary) -> SwallowedSpace:
        """No key says so: vocabularies are known by name, as at the end of llama.cpp's `llama_vocab::impl::load`."""
        pre = file.get("tokenizer.ggml.pre", str, "")
        architecture = file.get("general.architecture", str, "")
        name = file.get("general.name", str, "").lower()
        special = vocabulary.ids_of(TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
        if any(known in pre for known in ("jina-v2-de", "jina-v2-es", "jina-v2-code")) or any(
            known in architecture for known in ("nomic-bert-moe", "jina-bert-v3")
        ):
            return cls(before=frozenset(special[text] for text in special.keys() & {"<mask>"}))
        if "phi-3" in name or "phi3" in name:
            return cls(after=frozenset(special[text] for text in special.keys() - {"<unk>", "<s>", "<|endoftext|>"}))
        if "modern-bert" in name:
            return cls(before=frozenset(special[text] for text in special.keys() & {"[MASK]"}))
        return cls()


class SpecialTokens:
    """Splits a text at the tokens given: `ids` maps each one's text to its id.

    Of tokens that overlap in a text the longest in UTF-8 bytes wins, of equally long ones the lower id, then the
    leftmost place; that is what searching for one token after the other, longest first, comes to. White space beside
    a token goes with it as `swallows` says.
    """

    def __init__(self, ids: Mapping[str, int], swallows: SwallowedSpace = SwallowedSpace()) -> None:
        self._ids = ids
        self._swallows = swallows
        self._longest = LongestMatch(ids)
        self._start = re.compile("|".join(map(re.escape, self._longest.starts)))

    def split(self, text: str) -> Iterator[str | int]:
        """The text in order: an id for each token found, and the pieces of text between them, none empty."""
        position, before = 0, None
        for start, end, token in [*self._find(text), (len(text), len(text), None)]:
            piece = text[position:start]
            if before in self._swallows.after:
                piece = piece.lstrip(_SPACES)
            if token in self._swallows.before:
                piece = piece.rstrip(_SPACES)
            if piece:
                yield piece
            if token is not None:
                yield token
            position, before = end, token

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
        end = self._longest.end(text, start, limit)
        if end == start:
            return None
        piece = text[start:end]
        return -len(piece.encode("utf-8", "surrogateescape")), self._ids[piece], start, end
