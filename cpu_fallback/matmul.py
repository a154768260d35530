"""Products with packed weights on the CPU.

Few rows of activations meet the blocks in place (see `rowdot`). Many rows pay for decoding a tile of weights once: to
16-bit integers that meet rounded activations (see `tiledot`), or, where the product is exact or the weights are floats,
to float32 for BLAS. No weight is ever expanded as a whole. Without Numba the tiles for BLAS serve for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trichord.cpu_fallback.decode import DECODERS, GROUP
from trichord.cpu_fallback.dequantize import dequantize_rows
from trichord.cpu_fallback.jit import have_numba
from trichord.weight_format import Weight, WeightFormat

FUSED_FORMATS = frozenset(DECODERS)

MOST_ROWS_IN_PLACE = {"exact": 20, "default": 8, "fast": 8}
"""Up to so many rows of activations the kernels on packed blocks are faster than tiles (measured)."""

_TILE_WEIGHTS = 1 << 20
"""Weights of a decoded tile: large enough for BLAS at full speed, small enough for a shared cache."""


def pack(blocks: torch.Tensor, format: WeightFormat, columns: int) -> torch.Tensor:
    """GGUF blocks (rows, row_bytes) uint8 are the layout of this backend: returned as they are, not copied."""
    return blocks


def unpack(data: torch.Tensor, format: WeightFormat, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `pack`: (rows, row_bytes) uint8, not copied."""
    return data


def dequantize(weight: Weight) -> torch.Tensor:
    """The whole weight as float32 of `weight.shape` (without `weight.scale`)."""
    values = torch.empty(weight.rows, weight.in_features)
    _decode(weight.data, weight.format, values)
    return values.reshape(weight.shape)


def embedding(ids: torch.Tensor, weight: Weight) -> torch.Tensor:
    """ids (T,) int64 -> their rows (T, K) float32. Raises ValueError for an id that is no row."""
    numbers = ids.numpy()
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < weight.rows:
        raise ValueError(f"token ids from {numbers.min()} to {numbers.max()} do not all lie in 0 to {weight.rows - 1}")
    values = torch.empty(len(ids), weight.in_features)
    _decode(weight.data[ids], weight.format, values)
    return values


def matmul(
    x: torch.Tensor,
    weights: Sequence[Weight],
    precision: str,
    biases: Sequence[torch.Tensor | None] | None = None,
) -> list[torch.Tensor]:
    """x (T, K) float32 -> [x @ W.T (T, N) float32 for each weight], times `weight.scale`, plus its bias (N,) if any."""
    x = x.contiguous()
    results = [torch.empty(x.shape[0], weight.out_features) for weight in weights]
    few, many = [], []
    for weight, y in zip(weights, results, strict=True):
        used = used_precision(weight.format, precision)
        (few if x.shape[0] <= most_rows_in_place(weight.format, used) else many).append((weight, used, y))
    if few and x.numel():
        from trichord.cpu_fallback.in_place import multiply

        multiply(x, few)
    multiply_many(x, many)
    for weight, bias, y in zip(weights, biases or [None] * len(weights), results, strict=True):
        if weight.scale != 1.0:
            y *= weight.scale
        if bias is not None:
            y += bias
    return results


def used_precision(format: WeightFormat, precision: str) -> str:
    """Weights in floats have no faster way than the exact one."""
    return "exact" if format.block_size == 1 else precision


def most_rows_in_place(format: WeightFormat, precision: str) -> int:
    """Up to so many rows of activations meet a matrix in place; more of them, tiles and BLAS."""
    return MOST_ROWS_IN_PLACE[precision] if _has_kernels(format) else 0


def _has_kernels(format: WeightFormat) -> bool:
    return format in FUSED_FORMATS and have_numba()


def multiply_many(x: torch.Tensor, products: Sequence[tuple[Weight, str, torch.Tensor]]) -> None:
    """x (T, K) float32, contiguous, times each weight (N, K) -> y (T, N), contiguous, of a `used_precision`."""
    rounded = []
    for weight, used, y in products:
        if used != "exact" and _has_kernels(weight.format):
            rounded.append((weight, y))
        else:
            _multiply_tiles(x, weight, y)
    if rounded:
        from trichord.cpu_fallback.in_place import multiply_panels

        multiply_panels(x, rounded)


def _multiply_tiles(x: torch.Tensor, weight: Weight, y: torch.Tensor) -> None:
    """y (T, N) = x (T, K) @ W.T, decoding a tile of W (N, K) after the other."""
    rows, columns = weight.shape
    step = max(1, _TILE_WEIGHTS // columns)
    buffer = torch.empty(min(step, rows), columns)
    for first in range(0, rows, step):
        packed = weight.data[first : first + step]
        if weight.format is WeightFormat.F32 and packed.data_ptr() % 4 == packed.stride(0) % 4 == 0:
            tile = packed.view(torch.float32)
        else:
            tile = buffer[: len(packed)]
            _decode(packed, weight.format, tile)
        torch.mm(x, tile.T, out=y[:, first : first + step])


def _decode(data: torch.Tensor, format: WeightFormat, values: torch.Tensor) -> None:
    """Packed rows (R, row_bytes) uint8 -> values (R, columns) float32."""
    if not _has_kernels(format) or values.shape[1] % GROUP:  # the kernels write whole groups
        values.numpy()[...] = dequantize_rows(data.numpy(), format)
    elif values.numel():
        from trichord.cpu_fallback.in_place import decode

        decode(data, format, values)
