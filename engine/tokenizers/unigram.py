"""SentencePiece's unigram language model (`tokenizer.ggml.model` "t5"): T5, XLM-RoBERTa and what is made from them.

A text is normalized, its spaces are written as U+2581, and of all ways to cut it into tokens the one of the highest
total score is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from trichord.errors import TokenizerError
from trichord.tokenizers.best_path import BestPath
from trichord.tokenizers.byte_tokens import ByteTokens
from trichord.tokenizers.charsmap import Charsmap
from trichord.tokenizers.vocabulary import SPACE, TokenType, Vocabulary, required_scores

if TYPE_CHECKING:
    from trichord.gguf_file import GGUFFile

_UNKNOWN_PENALTY = 10.0  # below the least score of a token, in SentencePiece as in the `tokenizers` library


class Unigram:
    """Encodes text and gives the bytes of normal tokens, by one file's vocabulary and scores."""

    adds_bos, adds_eos = False, True
    insists_on_bos = False

    @staticmethod
    def default_ids(file: GGUFFile) -> Mapping[str, int]:
        """Those of T5's own vocabulary."""
        return {"eos": 1, "unknown": 2}

    def __init__(self, vocabulary: Vocabulary, file: GGUFFile) -> None:
        self.adds_space = file.get("tokenizer.ggml.add_space_prefix", bool, False)
        self._merges_spaces = file.get("tokenizer.ggml.remove_extra_whitespaces", bool, False)
        self._charsmap = _charsmap(file)
        scores = required_scores(vocabulary)
        normal = vocabulary.ids_of(TokenType.NORMAL)  # unused ones fill gaps, with scores that mean nothing
        if not normal:
            raise TokenizerError(f"{file.path.name}: the vocabulary has no normal tokens")
        user_defined = vocabulary.ids_of(TokenType.USER_DEFINED)
        self._ids = normal | user_defined
        least = float(min(scores[token] for token in normal.values()))
        of_tokens = {text: float(scores[token]) for text, token in normal.items()} | dict.fromkeys(user_defined, 0.0)
        self._path = BestPath(of_tokens, least - _UNKNOWN_PENALTY, file.path.name)
        self._byte_tokens = ByteTokens(vocabulary)

    def encode(self, text: str, after_special: bool) -> list[int]:
        """The ids of a piece of text that has no special tokens in it."""
        ids: list[int] = []
        for piece in self._path.cut(self._normalize(text)):
            token = self._ids.get(piece)
            ids += self._byte_tokens.encode(piece) if token is None else [token]
        return ids

    def bytes_of(self, text: str) -> bytes:
        """The bytes that a normal token of this text stands for."""
        return text.replace(SPACE, " ").encode("utf-8", "surrogateescape")

    def _normalize(self, text: str) -> str:
        """As https://github.com/google/sentencepiece/blob/master/src/normalizer.cc does it."""
        if self._charsmap:
            text = self._charsmap.normalize(text)
        if self._merges_spaces:
            text = " ".join(filter(None, text.split(" ")))
        if text and self.adds_space:
            text = " " + text
        return text.replace(" ", SPACE)


def _charsmap(file: GGUFFile) -> Charsmap | None:
    key = "tokenizer.ggml.precompiled_charsmap"
    data = file.get(key, list)
    if data is None or len(data) == 0:
        return None
    if not isinstance(data, np.ndarray) or data.dtype.itemsize != 1:
        raise TokenizerError(f"{file.path.name}: metadata key {key!r} is not an array of bytes")
    return Charsmap(data.tobytes(), file.path.name)
