"""Packed weights read in place by compiled kernels: the jobs of products and of dequantization. Needs Numba."""

from __future__ import annotations

import functools
from typing import TypeAlias

import numpy as np
import torch

from trichord.cpu_fallback.activations import Activations, prepare, prepare_panels
from trichord.cpu_fallback.jit import compiled, threads
from trichord.cpu_fallback.jobs import FIELDS, Job, run
from trichord.cpu_fallback.rowdot import dequantize_kernel, dot_kernel
from trichord.cpu_fallback.tiledot import TILE_ROWS, tile_kernel
from trichord.weight_format import Weight, WeightFormat

_STEPS = (4, 2, 1)
"""Rows of activations a kernel takes at a time; more would not stay in 16 registers."""
_CHUNK_WEIGHTS = 1 << 17, 1 << 22
"""Weights a thread takes at a time, at least and at most: 4 to 100 microseconds of work.

What a chunk begins with has not been fetched ahead.
"""
_CHUNKS = 2
"""Chunks for each thread where they are no larger than that: for threads of unequal speed."""
_KERNEL, _ROWS, _CHUNK_ROWS, _COLUMNS, _WEIGHTS, _ROW_BYTES, _TOKENS, _PAIRS, _X, _Y = map(
    FIELDS.index, ("kernel", "rows", "chunk_rows", "columns", "weights", "row_bytes", "tokens", "pairs", "x", "y")
)

Product: TypeAlias = tuple[Weight, str, torch.Tensor]
"""A weight, the precision it is multiplied in, and where the results go: float32, contiguous."""


def multiply(x: torch.Tensor, products: list[Product]) -> None:
    """x (T, K) float32, contiguous, times whole matrices: y (T, N) for each product, all in one parallel region.

    A token takes a hundred of these calls: of their jobs, only addresses change from one to the next.
    """
    fixed, owners = _whole_jobs(tuple(_matrix(*product) for product in products), len(x), threads())
    jobs = fixed.copy()
    jobs[:, _Y] = [products[owner][2].data_ptr() for owner in owners]
    activations = _enter(jobs, x, [products[owner][1] for owner in owners])
    run(jobs)
    del activations  # not before: the jobs only know their addresses


def multiply_paired(
    x: torch.Tensor, products: list[Product], pairs: np.ndarray, starts: np.ndarray, counts: np.ndarray
) -> None:
    """Rows of x (R, K) times those matrices of experts that they are paired with, all in one parallel region.

    pairs (P, 2) int64: a row of x, and the row of y that its product becomes. Expert m of weight w takes
    counts[w, m] pairs from starts[m] on (int64); what it decodes, up to four of them share.
    """
    templates = np.array([_template(*_matrix(*product)[:4]) for product in products], np.int64)
    templates[:, _Y] = [y.data_ptr() for _, _, y in products]
    activations = _enter(templates, x, [precision for _, precision, _ in products])
    most = counts.max()
    kernels = [_kernels(weight.format, precision, most) for weight, precision, _ in products]
    jobs = np.empty((len(products) * min(len(pairs), len(_STEPS) * len(starts)), len(FIELDS)), np.int64)
    used = _fill(jobs, templates, np.array(kernels, np.int64), pairs, starts, counts)
    _set_chunks(jobs[:used])
    run(jobs[:used])
    del activations


def multiply_panels(x: torch.Tensor, products: list[tuple[Weight, torch.Tensor]]) -> None:
    """x (T, K) float32, contiguous, rounded to 16 bits, times whole matrices: y (T, N) for each, in one region.

    Each matrix is decoded once for all rows of x, or for hundreds of them.
    """
    panels = prepare_panels(x)
    run([
        Job(
            tile_kernel(weight.format), weight.out_features, TILE_ROWS, x.shape[1], weight.data.data_ptr(),
            weight.data.stride(0), y.data_ptr(), y.stride(0), len(x), 0, *panels.addresses,
        )
        for weight, y in products
    ])  # fmt: skip
    del panels


def _matrix(weight: Weight, precision: str, _: torch.Tensor) -> tuple[int, int, int, int, WeightFormat, str]:
    data = weight.data
    return data.data_ptr(), data.stride(0), weight.out_features, weight.in_features, weight.format, precision


def _template(address: int, row_bytes: int, rows: int, columns: int) -> Job:
    return Job(0, rows, 1, columns, address, row_bytes, y_stride=rows)


def _set_chunks(jobs: np.ndarray) -> None:
    """Divides the rows of all jobs among the threads."""
    least, most = _CHUNK_WEIGHTS
    weights = int(np.sum(jobs[:, _ROWS] * jobs[:, _COLUMNS]))
    chunk = min(max(weights // (_CHUNKS * threads()), least), most)
    jobs[:, _CHUNK_ROWS] = np.maximum(1, chunk // jobs[:, _COLUMNS])


def _kernels(format: WeightFormat, precision: str, most: int) -> list[int]:
    """Addresses of the kernels for `_STEPS`, as far as so many rows of activations need them."""
    return [dot_kernel(format, precision, step) if step <= most else 0 for step in _STEPS]


def _enter(jobs: np.ndarray, x: torch.Tensor, precisions: list[str]) -> list[Activations]:
    """Prepares x for each precision and enters it in the jobs; the result must live as long as these."""
    prepared = {precision: prepare(x, precision) for precision in set(precisions)}
    for precision, activations in prepared.items():
        rows = slice(None) if len(prepared) == 1 else [i for i, used in enumerate(precisions) if used == precision]
        jobs[rows, _X : _X + 4] = activations.addresses
    return list(prepared.values())


@functools.lru_cache(maxsize=4096)
def _whole_jobs(matrices: tuple[tuple, ...], tokens: int, _: int) -> tuple[np.ndarray, list[int]]:
    """The jobs of `multiply` without the addresses of a call, and the number of the matrix that each belongs to.

    They are divided for the present number of threads, by which the results are kept.
    """
    templates = np.array([_template(*matrix[:4]) for matrix in matrices], np.int64)
    kernels = np.array([_kernels(*matrix[4:], tokens) for matrix in matrices], np.int64)
    jobs = np.empty((len(matrices) * len(_STEPS), len(FIELDS)), np.int64)
    starts, counts = np.zeros(1, np.int64), np.full((len(matrices), 1), tokens, np.int64)
    used = _fill(jobs, templates, kernels, _rows_in_order(tokens), starts, counts)
    _set_chunks(jobs[:used])
    return jobs[:used], [i * len(matrices) // used for i in range(used)]


@functools.cache  # for as many numbers of rows as are multiplied in place; the jobs know its address
def _rows_in_order(count: int) -> np.ndarray:
    """Pairs of every row of x with the same row of y."""
    return (np.arange(2 * count, dtype=np.int64) // 2).reshape(-1, 2)


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
    job = _template(data.data_ptr(), data.stride(0), *values.shape)
    chunk_rows, kernel = max(1, _CHUNK_WEIGHTS[0] // job.columns), dequantize_kernel(format)
    run([job._replace(kernel=kernel, chunk_rows=chunk_rows, y=values.data_ptr(), y_stride=values.stride(0))])
