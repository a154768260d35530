"""Packed weights read in place by compiled kernels: the jobs of products and of dequantization. Needs Numba."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from trichord.cpu_fallback.activations import BYTES, Activations, prepare
from trichord.cpu_fallback.jobs import run
from trichord.cpu_fallback.rowdot import dequantize_kernel, dot_kernel
from trichord.weight_format import Weight, WeightFormat

_TOKENS = (4, 2, 1)
"""Rows of activations a kernel takes at a time; more would not stay in 16 registers."""
_CHUNK_WEIGHTS = 1 << 17
"""Weights a thread takes at a time: some 8 microseconds of work, and a packed chunk stays in the cache."""


def multiply(x: torch.Tensor, products: list[tuple[Weight, str, torch.Tensor]]) -> None:
    """y (T, N) = x (T, K) @ W.T for each (W, precision, y), all in one parallel region. All float32, contiguous."""
    activations = {precision: prepare(x, precision) for precision in {precision for _, precision, _ in products}}
    run([job for weight, p, y in products for job in _dot_jobs(weight, p, activations[p], y)])


def decode(data: torch.Tensor, format: WeightFormat, values: torch.Tensor) -> None:
    """Packed rows (R, row_bytes) uint8 -> values (R, columns) float32; columns in whole groups of 32."""
    run([_job(data, values.shape[1], values) | {"kernel": dequantize_kernel(format)}])


def _job(data: torch.Tensor, columns: int, y: torch.Tensor) -> dict[str, int]:
    rows, row_bytes = data.shape[0], data.stride(0)
    place = {"weights": data.data_ptr(), "row_bytes": row_bytes, "y": y.data_ptr(), "y_stride": y.stride(0)}
    return place | {"rows": rows, "chunk_rows": max(1, _CHUNK_WEIGHTS // columns), "columns": columns}


def _dot_jobs(weight: Weight, precision: str, x: Activations, y: torch.Tensor) -> Iterator[dict[str, int]]:
    """The rows of activations by fours, the rest by two and one."""
    whole, columns, done = _job(weight.data, weight.shape[1], y), x.columns, 0
    for step in _TOKENS:
        if count := (y.shape[0] - done) // step * step:
            yield whole | {
                "kernel": dot_kernel(weight.format, precision, step),
                "tokens": count,
                "y": whole["y"] + 4 * whole["y_stride"] * done,
                "x": x.x + BYTES[precision] * columns * done,
                "x_scales": x.scales + columns // 8 * done,
                "x_sums": x.sums + columns // 8 * done,
                "x_half_sums": x.half_sums + columns // 4 * done,
            }
            done += count
