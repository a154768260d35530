"""Embeddings: the hidden states of a text's tokens, pooled to one vector."""

from __future__ import annotations

from typing import Literal

import numpy as np

from trichord.errors import ModelError
from trichord.gguf_file import GGUFFile

Pooling = Literal["mean", "first", "last"]

_BY_ID: dict[int, Pooling | None] = {0: None, 1: "mean", 2: "first", 3: "last"}
_UNSET = (-1, 2**32 - 1)


def file_pooling(file: GGUFFile, architecture: str, causal: bool) -> Pooling:
    """How the file's metadata (`pooling_type`, llama.cpp's numbers) wants its states pooled.

    Without a word of it: the last state, which has seen all, of a causal model, else the mean. Raises ModelError for a
    number that stands for no vector, as rerankers have it.
    """
    number = file.get(f"{architecture}.pooling_type", int, -1)
    if number not in _UNSET and number not in _BY_ID:
        raise ModelError(f"{file.path.name}: pooling type {number} gives no embedding (1: mean, 2: first, 3: last).")
    return _BY_ID.get(number) or ("last" if causal else "mean")


def pool(states: np.ndarray, pooling: Pooling, normalize: bool) -> np.ndarray:
    """states (n_tokens, n_hidden) -> (n_hidden,) float32, of Euclidean length 1 if `normalize`."""
    pooled = states if pooling == "mean" else states[:1] if pooling == "first" else states[-1:]
    vector = pooled.mean(0, dtype=np.float64)
    if normalize:
        vector = vector / max(float(np.linalg.norm(vector)), 1e-30)
    return vector.astype(np.float32)
