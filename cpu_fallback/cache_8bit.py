"""The 8-bit key-value cache in NumPy: int8 numbers, and a float16 scale for each 32 elements of a head's row."""

from __future__ import annotations

import numpy as np

_GROUP = 32


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 (..., D) -> int8 of that shape, and scales (..., ceil(D/32)) float16.

    A group's scale is its largest magnitude over 127, NaN where it has a NaN.
    """
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        scales = np.maximum.reduceat(abs(x), np.arange(0, x.shape[-1], _GROUP), axis=-1) / np.float32(127)
        scales = scales.astype(np.float16)
        inverse = np.where(scales > 0, 1 / scales.astype(np.float32), np.float32(0))
        numbers = np.rint(x * _spread(inverse, x.shape[-1]))
    return np.clip(np.nan_to_num(numbers), -127, 127).astype(np.int8), scales


def dequantized(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The inverse of `quantized`, float32."""
    return numbers * _spread(scales.astype(np.float32), numbers.shape[-1])


def _spread(scales: np.ndarray, size: int) -> np.ndarray:
    """Each group's scale for each of its elements."""
    return scales.repeat(_GROUP, axis=-1)[..., :size]
