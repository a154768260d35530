"""Packed weights read in place by compiled kernels: the jobs of products and of dequantization. Needs Numba."""

from __future__ import annotations

import numpy as np
import torch

from trichord.cpu_fallback.activations import prepare
from trichord.cpu_fallback.jit import compiled
from trichord.cpu_fallback.jobs import FIELDS, run, table
from trichord.cpu_fallback.rowdot import dequantize_kernel, dot_kernel
from trichord.weight_format import Weight, WeightFormat

_STEPS = (4, 2, 1)
"""Rows of activations a kernel takes at a time; more would not stay in 16 registers."""
_CHUNK_WEIGHTS = 1 << 17
"""Weights a thread takes at a time: some 8 microseconds of work, and a packed chunk stays in the cache."""
_KERNEL, _ROWS, _WEIGHTS, _ROW_BYTES, _TOKENS, _PAIRS = map(
    FIELDS.index, ("kernel", "rows", "weights", "row_bytes", "tokens", "pairs")
)


def multiply(
    x: torch.Tensor,
    products: list[tuple[Weight, str, torch.Tensor]],
    pairs: np.ndarray,
    starts: np.ndarray,
    counts: np.ndarray,
) -> None:
    """Rows of x (R, K) times matrices of each (weight, precision, y), all in one parallel region.

    pairs (P, 2) int64: a row of x, and the row of y that its product becomes. Matrix m of weight w (the weight itself,
    or an expert's) takes counts[w, m] pairs from starts[m] on (int64); what it decodes, up to four of them share.
    x and every y are float32 and contiguous.
    """
    prepared = {precision: prepare(x, precision) for precision in {precision for _, precision, _ in products}}
    most, templates, kernels = counts.max(), [], []
    for weight, precision, y in products:
        activations = prepared[precision]
        templates.append(
            _job(weight.data, weight.out_features, weight.in_features, y)
            | {"x": activations.x, "x_scales": activations.scales}
            | {"x_sums": activations.sums, "x_half_sums": activations.half_sums}
        )
        kernels.append([dot_kernel(weight.format, precision, step) if step <= most else 0 for step in _STEPS])
    jobs = np.empty((len(products) * min(len(pairs), len(_STEPS) * len(starts)), len(FIELDS)), np.int64)
    used = _fill(jobs, table(templates), np.array(kernels, np.int64), pairs, starts, counts)
    run(jobs[:used])


@compiled
def _fill(jobs, templates, kernels, pairs, starts, counts):  # type: ignore[no-untyped-def]
    """Writes the jobs, and returns how many: the pairs of a matrix by fours, the rest by two and one."""
    used = 0
    for weight in range(len(templates)):
        matrix_bytes = templates[weight, _ROWS] * templates[weight, _ROW_BYTES]
        for matrix in range(len(starts)):
            pair, left = starts[matrix], counts[weight, matrix]
            for i in range(len(_STEPS)):
                tokens = left // _STEPS[i] * _STEPS[i]
                if tokens:
                    jobs[used] = templates[weight]
                    jobs[used, _KERNEL] = kernels[weight, i]
                    jobs[used, _WEIGHTS] += matrix * matrix_bytes
                    jobs[used, _TOKENS] = tokens
                    jobs[used, _PAIRS] = pairs.ctypes.data + 16 * pair
                    pair, left, used = pair + tokens, left - tokens, used + 1
    return used


def decode(data: torch.Tensor, format: WeightFormat, values: torch.Tensor) -> None:
    """Packed rows (R, row_bytes) uint8 -> values (R, columns) float32; columns in whole groups of 32."""
    run([_job(data, data.shape[0], values.shape[1], values) | {"kernel": dequantize_kernel(format)}])


def _job(data: torch.Tensor, rows: int, columns: int, y: torch.Tensor) -> dict[str, int]:
    place = {"weights": data.data_ptr(), "row_bytes": data.stride(0), "y": y.data_ptr(), "y_stride": y.stride(0)}
    return place | {"rows": rows, "chunk_rows": max(1, _CHUNK_WEIGHTS // columns), "columns": columns}
