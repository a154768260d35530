"""Weights in every format with the values that GGML gives them, of any shape, from the parity data `formats.npz`."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from support import parity

from trichord.weight_format import Weight, WeightFormat

GOLDEN_COLUMNS = 512  # of every array in the file


@cache
def _arrays() -> dict[str, np.ndarray]:
    with np.load(parity("formats.npz")) as file:
        return dict(file)


def has_golden(weight_format: WeightFormat, kind: str) -> bool:
    """Whether `golden` has something to give."""
    return _key(weight_format, kind) + "blocks" in _arrays()


def golden(weight_format: WeightFormat, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(blocks (rows, row_bytes) uint8, values (rows, 512) float32).

    Kind "quantized" has 16 rows of weights that GGML quantized, "random" 64 rows of random bytes.
    """
    key = _key(weight_format, kind)
    return _arrays()[key + "blocks"], _arrays()[key + "values"]


def _key(weight_format: WeightFormat, kind: str) -> str:
    return f"{weight_format.name}.{'random_' if kind == 'random' else ''}"


def golden_blocks(weight_format: WeightFormat, rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(blocks (rows, row_bytes) uint8, values (rows, columns) float32): a random choice of the quantized blocks."""
    blocks, values = golden(weight_format, "quantized")
    blocks, values = blocks.reshape(-1, weight_format.block_bytes), values.reshape(-1, weight_format.block_size)
    shape = (rows, columns // weight_format.block_size)
    choice = np.random.default_rng(seed).integers(0, len(blocks), shape)
    return blocks[choice].reshape(rows, -1), values[choice].reshape(rows, -1)


def packed(operations, blocks: np.ndarray, weight_format: WeightFormat, shape: tuple[int, ...]) -> Weight:
    """The weight of this shape as a backend holds it."""
    data = operations.pack(torch.from_numpy(blocks), weight_format, shape[-1])
    return Weight(data, weight_format, shape, operations.LAYOUT)
