"""Activations as integers: groups of 32 rounded to 16 or 8 bits, with their scale and their sums."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from trichord.cpu_fallback.decode import GROUP
from trichord.cpu_fallback.jit import compiled


class Activations(NamedTuple):
    """Rows of activations as the kernels of `rowdot` read them, padded with zeros to whole groups of 32."""

    x: torch.Tensor
    """(T, K) float32, int8, or int16: then of each group first the 16 even ones, then the 16 odd ones."""
    scales: torch.Tensor
    """(T, K / 32) float32: what one step of the integers stands for."""
    sums: torch.Tensor
    """(T, K / 32) float32: the sum of each group, as rounded."""
    half_sums: torch.Tensor
    """(T, K / 16) float32: the sum of each half of a group."""


def prepare(x: torch.Tensor, precision: str) -> Activations:
    """x (T, K) float32, contiguous, for the kernels of a precision: as it is, or rounded to 16 or 8 bits."""
    if rest := x.shape[1] % GROUP:
        x = torch.nn.functional.pad(x, (0, GROUP - rest))
    tokens, columns = x.shape
    # Not NumPy's memory: torch aligns to 64 bytes, so that no load of 32 crosses a cache line.
    scales, sums = (torch.empty(tokens, columns // GROUP) for _ in range(2))
    half_sums = torch.empty(tokens, 2 * columns // GROUP)
    groups = x.numpy().reshape(-1, GROUP)
    flat_sums = sums.numpy().reshape(-1), half_sums.numpy().reshape(-1, 2)
    if precision == "exact":
        _sum(groups, *flat_sums)
        return Activations(x, scales, sums, half_sums)
    quants = torch.empty(x.shape, dtype=torch.int16 if precision == "default" else torch.int8)
    # Where in a group to put the quant number 16 * half + 2 * pair + odd.
    order = (8, 1, 16) if precision == "default" else (16, 2, 1)
    limit = np.float32(torch.iinfo(quants.dtype).max)
    outputs = quants.numpy().reshape(-1, GROUP), scales.numpy().reshape(-1), *flat_sums
    _round(groups, groups.view(np.int32), *outputs, limit, *order)
    return Activations(quants, scales, sums, half_sums)


@compiled(fastmath={"reassoc"})
def _sum(x, sums, half_sums):  # type: ignore[no-untyped-def]
    for group in range(len(x)):
        for half in range(2):
            total = np.float32(0)
            for i in range(16):
                total += x[group, 16 * half + i]
            half_sums[group, half] = total
        sums[group] = half_sums[group, 0] + half_sums[group, 1]


@compiled
def _round(x, bits, quants, scales, sums, half_sums, limit, half_step, pair_step, odd_step):  # type: ignore[no-untyped-def]
    for group in range(len(x)):
        # As integers, absolute values keep their order, and infinity and NaN come out on top.
        largest_bits = np.int32(0)
        for i in range(32):
            largest_bits = max(largest_bits, bits[group, i] & 0x7FFFFFFF)
        if largest_bits >= 0x7F800000:
            quants[group], half_sums[group], sums[group], scales[group] = 0, np.nan, np.nan, np.nan
            continue
        largest = np.float32(0)
        for i in range(32):
            largest = max(largest, abs(x[group, i]))
        scale, inverse = largest / limit, np.float32(0)
        if largest > np.float32(1e-30):
            inverse = limit / largest
        both = np.int32(0)
        for half in range(2):
            total = np.int32(0)
            for i in range(16):
                quant = np.int32(np.rint(x[group, 16 * half + i] * inverse))
                quants[group, half * half_step + i // 2 * pair_step + i % 2 * odd_step] = quant
                total += quant
            half_sums[group, half] = scale * np.float32(total)
            both += total
        sums[group] = scale * np.float32(both)
        scales[group] = scale
