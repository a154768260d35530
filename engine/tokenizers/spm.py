"""SentencePiece byte-pair encoding (`tokenizer.ggml.model` "llama"): Llama 1 and 2, Mistral, Gemma, Phi-3.

Spaces are written as U+2581. Of all pairs of neighbours that together are a token the one of the highest score is
merged first, of equal scores the leftmost, until no pair is left. Characters without a token become byte tokens.
(Libraries that merge by a list of pairs cannot do this: they give equal scores an order of their own.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from trichord.tokenizers.byte_tokens import ByteTokens
from trichord.tokenizers.cache import WordCache
from trichord.tokenizers.vocabulary import SPACE, TokenType, Vocabulary, required_scores

if TYPE_CHECKING:
    from trichord.gguf_file import GGUFFile


class SentencePiece:
    """Encodes text and gives the bytes of normal tokens, by one file's vocabulary and scores.

    Control, unknown and byte tokens never come out of merges, so that no text forges them.
    """

    adds_bos = True
    adds_eos = insists_on_bos = False

    @staticmethod
    def default_ids(file: GGUFFile) -> Mapping[str, int]:
        """Those of Llama's own vocabulary."""
        return {"unknown": 0, "bos": 1, "eos": 2}

    def __init__(self, vocabulary: Vocabulary, file: GGUFFile) -> None:
        self.adds_space = file.get("tokenizer.ggml.add_space_prefix", bool, True)
        self._ids = vocabulary.ids_of(TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED, TokenType.UNDEFINED)
        # Equal scores share a rank, or the leftmost would not win among them.
        _, ranks = np.unique(-required_scores(vocabulary), return_inverse=True)
        self._ranks = {text: int(ranks[token]) for text, token in self._ids.items() if len(text) > 1}
        self._meetings = _Meetings(self._ranks)
        self._byte_tokens = ByteTokens(vocabulary)
        self._words = WordCache(self._encode_word)

    def encode(self, text: str, after_special: bool) -> list[int]:
        """The ids of a piece of text that has no special tokens in it, but follows one or starts the whole text."""
        if after_special and self.adds_space:
            text = " " + text
        return self._words.encode(self._meetings.split(text.replace(" ", SPACE)))

    def bytes_of(self, text: str) -> bytes:
        """The bytes that a normal token of this text stands for."""
        return text.replace(SPACE, " ").encode("utf-8", "surrogateescape")

    def _encode_word(self, word: str) -> list[int]:
        ids: list[int] = []
        for piece in _merge(word, self._ranks):
            token = self._ids.get(piece)
            if token is None:
                ids += self._byte_tokens.encode(piece)
            else:
                ids.append(token)
        return ids


def _merge(word: str, ranks: dict[str, int]) -> Iterator[str]:
    """The word cut into the pieces that merging leaves. The lowest rank merges first, of equal ones the leftmost.

    Takes O(n log n): a symbol is known by the place of its first character, and a queue holds, for each pair of
    neighbours, its rank and the place of the left one as a single number. An entry counts if its rank is still that
    of the pair at its place.
    """
    n = len(word)
    end = list(range(1, n + 1))  # by place: where the symbol ends, and so where the next one begins
    before = list(range(-1, n - 1))  # by place: where the symbol before begins
    rank_of = ranks.get
    pair_rank = [rank_of(word[place : place + 2]) for place in range(n)]
    pair_rank[n - 1] = None
    queue = [rank * n + place for place, rank in enumerate(pair_rank) if rank is not None]
    heapify(queue)
    while queue:
        rank, place = divmod(heappop(queue), n)
        if pair_rank[place] != rank:
            continue
        absorbed = end[place]
        after = end[place] = end[absorbed]
        pair_rank[absorbed] = pair_rank[place] = None
        if after < n:
            before[after] = place
            rank = pair_rank[place] = rank_of(word[place : end[after]])
            if rank is not None:
                heappush(queue, rank * n + place)
        if place:
            left = before[place]
            rank = pair_rank[left] = rank_of(word[left:after])
            if rank is not None:
                heappush(queue, rank * n + left)
    place = 0
    while place < n:
        yield word[place : end[place]]
        place = end[place]


class _Meetings:
    """Which characters stand side by side inside some token: where two others meet in a text, no merge can cross.

    Kept as a table of hashes. Two pairs of characters that share one leave a word longer than it need be, which costs
    a little time and changes nothing else.
    """

    _BITS = 22

    def __init__(self, tokens: Iterable[str]) -> None:
        self._known = np.zeros(1 << self._BITS, bool)
        self._known[self._hashes("\U0010ffff".join(tokens))] = True

    def split(self, text: str) -> Iterator[str]:
        """The text cut at every place that no merge can cross."""
        cuts = np.flatnonzero(~self._known[self._hashes(text)]) + 1
        return (text[start:end] for start, end in pairwise([0, *cuts.tolist(), len(text)]))

    def _hashes(self, text: str) -> np.ndarray:
        """A hash of each pair of neighbouring characters (Fibonacci hashing, twice): (len(text) - 1,) uint32."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        mixed = codes[:-1] * np.uint32(0x9E3779B1) + codes[1:]
        return mixed * np.uint32(0x85EBCA6B) >> np.uint32(32 - self._BITS)
