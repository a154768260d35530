"""Activations as integers: groups of 32 rounded to 16 or 8 bits, with their scale and their sums."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from trichord.cpu_fallback.decode import GROUP
from trichord.cpu_fallback.jit import compiled


class Activations(NamedTuple):
    """Rows of activations as the kernels of `rowdot` read them, each padded with zeros to whole groups of 32."""

    x: np.ndarray
    """(T, K) float32, int8, or int16: then of each group first the 16 even ones, then the 16 odd ones."""
    scales: np.ndarray
    """(T, K / 32) float32: what one step of the integers stands for."""
    sums: np.ndarray
    """(T, K / 16) float32: the sums of 16 activations as rounded."""


def prepare(x: np.ndarray, precision: str) -> Activations:
    """x (T, K) float32, contiguous, for the kernels of a precision: as it is, or rounded to 16 or 8 bits."""
    if rest := x.shape[1] % GROUP:
        x = np.pad(x, ((0, 0), (0, GROUP - rest)))
    tokens, columns = x.shape
    scales = np.empty((tokens, columns // GROUP), np.float32)
    sums = np.empty((tokens, columns // 16), np.float32)
    if precision == "exact":
        _sum(x.reshape(-1, 16), sums.reshape(-1))
        return Activations(x, scales, sums)
    quants = np.empty(x.shape, np.int16 if precision == "default" else np.int8)
    # Where in a group to put the quant number 16 * half + 2 * pair + odd.
    order = (8, 1, 16) if precision == "default" else (16, 2, 1)
    largest = np.iinfo(quants.dtype).max
    groups = [array.reshape(scales.size, -1) for array in (x, x.view(np.int32), quants, sums)]
    _round(*groups, scales.reshape(-1), np.float32(largest), *order)
    return Activations(quants, scales, sums)


@compiled(fastmath={"reassoc"})
def _sum(x, sums):  # type: ignore[no-untyped-def]
    for group in range(len(x)):
        total = np.float32(0)
        for i in range(16):
            total += x[group, i]
        sums[group] = total


@compiled
def _round(x, bits, quants, sums, scales, limit, half_step, pair_step, odd_step):  # type: ignore[no-untyped-def]
    for group in range(len(x)):
        # As integers, absolute values keep their order, and infinity and NaN come out on top.
        largest_bits = np.int32(0)
        for i in range(32):
            largest_bits = max(largest_bits, bits[group, i] & 0x7FFFFFFF)
        if largest_bits >= 0x7F800000:
            quants[group], sums[group], scales[group] = 0, np.nan, np.nan
            continue
        largest = np.float32(0)
        for i in range(32):
            if bits[group, i] & 0x7FFFFFFF == largest_bits:
                largest = abs(x[group, i])
        scale, inverse = largest / limit, np.float32(0)
        if largest > np.float32(1e-30):
            inverse = limit / largest
        for half in range(2):
            total = np.int32(0)
            for i in range(16):
                quant = np.int32(np.rint(x[group, 16 * half + i] * inverse))
                quants[group, half * half_step + i // 2 * pair_step + i % 2 * odd_step] = quant
                total += quant
            sums[group, half] = scale * np.float32(total)
        scales[group] = scale
