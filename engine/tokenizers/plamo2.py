"""PLaMo 2's tokenizer (`tokenizer.ggml.model` "plamo2"): of all ways to cut a text the one of the highest total score.

Scores are counted in whole ten-thousandths, and the best way is sought from the text's end, so that of equal ones that
with the longest first token is taken: https://huggingface.co/pfnet/plamo-2-1b/blob/main/tokenization_plamo.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from trichord.tokenizers.best_path import BestPath
from trichord.tokenizers.byte_tokens import ByteTokens
from trichord.tokenizers.vocabulary import TokenType, Vocabulary, required_scores

if TYPE_CHECKING:
    from trichord.gguf_file import GGUFFile

_UNKNOWN = -10_000_000  # ten-thousandths, for a character that becomes byte tokens
_BYTE_ORDER_MARK = "\ufeff"


class PLaMo2:
    """Encodes text and gives the bytes of normal tokens, by one file's vocabulary and scores."""

    adds_bos = adds_eos = adds_space = insists_on_bos = False

    @staticmethod
    def default_ids(file: GGUFFile) -> Mapping[str, int]:
        """Those of PLaMo's own vocabulary."""
        return {"unknown": 0, "bos": 1, "eos": 2}

    def __init__(self, vocabulary: Vocabulary, file: GGUFFile) -> None:
        ids = vocabulary.ids_of(TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED, TokenType.UNDEFINED)
        scaled = required_scores(vocabulary).astype(np.float64) * 1e4
        scores = np.copysign(np.floor(np.abs(scaled) + 0.5), scaled)  # halves away from zero
        self._ids = {text: token for text, token in ids.items() if _UNKNOWN + 10 < scores[token] < np.inf}
        # Backwards, so that the search ends where the text begins.
        backwards = {text[::-1]: float(scores[token]) for text, token in self._ids.items()}
        self._path = BestPath(backwards, _UNKNOWN, file.path.name)
        self._byte_tokens = ByteTokens(vocabulary)

    def encode(self, text: str, after_special: bool) -> list[int]:
        """The ids of a piece of text that has no special tokens in it."""
        ids: list[int] = []
        for backwards in reversed(self._path.cut(text.removeprefix(_BYTE_ORDER_MARK)[::-1])):
            piece = backwards[::-1]
            token = self._ids.get(piece)
            ids += self._byte_tokens.encode(piece) if token is None else [token]
        return ids

    def bytes_of(self, text: str) -> bytes:
        """The bytes that a normal token of this text stands for."""
        return text.encode("utf-8", "surrogateescape")
