"""Products with packed weights on the CPU.

Few rows of activations meet the blocks in place (see `rowdot`). Many rows pay for decoding a tile of weights to
float32 once and multiplying by BLAS; no weight is ever expanded as a whole. Without Numba the tiles serve for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from trichord.cpu_fallback.activations import Activations, prepare
from trichord.cpu_fallback.decode import DECODERS, GROUP
from trichord.cpu_fallback.dequantize import dequantize_rows
from trichord.cpu_fallback.jit import have_numba
from trichord.weight_format import Weight, WeightFormat

FUSED_FORMATS = frozenset(DECODERS)

MOST_ROWS_IN_PLACE = {"exact": 16, "default": 64, "fast": 64}
"""Up to so many rows of activations the kernels on packed blocks are faster than tiles and BLAS (measured)."""

_TOKENS = (4, 2, 1)
"""Rows of activations a kernel takes at a time; more would not stay in 16 registers."""
_CHUNK_WEIGHTS = 1 << 17
"""Weights a thread takes at a time: some 8 microseconds of work, and a packed chunk stays in the cache."""
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
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < weight.rows:
        raise ValueError(
            f"token ids from {int(ids.min())} to {int(ids.max())} do not all lie in 0 to {weight.rows - 1}"
        )
    values = torch.empty(len(ids), weight.in_features)
    _decode(weight.data[ids], weight.format, values)
    return values


def matmul(x: torch.Tensor, weights: Sequence[Weight], precision: str) -> list[torch.Tensor]:
    """x (T, K) float32 -> [x @ W.T (T, N) float32 for each weight], without `weight.scale`."""
    x = x.contiguous()
    results = [torch.empty(len(x), weight.out_features) for weight in weights]
    if not len(x):
        return results
    activations: dict[str, Activations] = {}
    jobs: list[dict[str, int]] = []
    for weight, y in zip(weights, results, strict=True):
        used = "exact" if weight.format.block_size == 1 else precision
        if len(x) > MOST_ROWS_IN_PLACE[used] or not _has_kernels(weight.format):
            _multiply_tiles(x, weight, y)
            continue
        if used not in activations:
            activations[used] = prepare(x, used)
        jobs += _dot_jobs(weight, used, activations[used], y)
    _run(jobs)
    return results


def _has_kernels(format: WeightFormat) -> bool:
    return format in FUSED_FORMATS and have_numba()


def _run(jobs: list[dict[str, int]]) -> None:
    if jobs:
        from trichord.cpu_fallback.jobs import run  # it imports Numba

        run(jobs)


def _row_job(data: torch.Tensor, columns: int, y: torch.Tensor) -> dict[str, int]:
    """What every job over the packed rows `data` says, with results in y."""
    return {
        "rows": len(data),
        "chunk_rows": max(1, _CHUNK_WEIGHTS // columns),
        "weights": data.data_ptr(),
        "row_bytes": data.stride(0),
        "columns": columns,
        "y": y.data_ptr(),
        "y_stride": y.stride(0),
    }


def _dot_jobs(weight: Weight, precision: str, activations: Activations, y: torch.Tensor) -> Iterator[dict[str, int]]:
    """The rows of activations by fours, the rest by two and one."""
    from trichord.cpu_fallback.rowdot import dot_kernel

    done = 0
    for step in _TOKENS:
        if count := (len(y) - done) // step * step:
            yield _row_job(weight.data, weight.in_features, y[done:]) | {
                "kernel": dot_kernel(weight.format, precision, step),
                "tokens": count,
                "x": activations.x[done:].data_ptr(),
                "x_scales": activations.scales[done:].data_ptr(),
                "x_sums": activations.sums[done:].data_ptr(),
                "x_half_sums": activations.half_sums[done:].data_ptr(),
            }
        done += count


def _multiply_tiles(x: torch.Tensor, weight: Weight, y: torch.Tensor) -> None:
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
    """Packed rows -> values (rows, columns) float32."""
    columns = values.shape[1]
    if not _has_kernels(format) or columns % GROUP:  # the kernel writes whole groups
        values.numpy()[...] = dequantize_rows(data.numpy(), format)
        return
    from trichord.cpu_fallback.rowdot import dequantize_kernel

    _run([_row_job(data, columns, values) | {"kernel": dequantize_kernel(format)}])
