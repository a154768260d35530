"""Quantizing: weights of rows to blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trichord.errors import DeviceError

if TYPE_CHECKING:
    import numpy as np

    from trichord.weight_format import WeightFormat


def quantize_blocks(values: np.ndarray, format: WeightFormat, importance: np.ndarray | None = None) -> np.ndarray:
    """Rows of weights as GGUF blocks.

    values: (rows, columns) float32, finite. importance: (columns,) float32, the mean square of the activations that
    meet each column (an importance matrix), or None to count every column alike. Returns (rows, row_bytes) uint8.
    Raises ValueError when the columns do not fill whole blocks or the format has no quantizer, DeviceError
    without Numba.
    """
    try:
        from trichord.quantize_formats import quantize_rows
    except ImportError as error:
        raise DeviceError(f"quantizing needs Numba (pip install numba): {error}") from error
    return quantize_rows(values, format, importance)
