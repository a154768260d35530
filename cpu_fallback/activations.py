"""Activations as the kernels of `rowdot` read them: rounded to 16 or 8 bits in groups of 32, with scales and sums."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from llvmlite import ir

from trichord.cpu_fallback.decode import GROUP
from trichord.cpu_fallback.jobs import Job, compile_kernel, run
from trichord.cpu_fallback.vectors import F32, I8, I16, I32, Emitter, Vector

BYTES = {"exact": 4, "default": 2, "fast": 1}
"""Of one activation, in each precision."""


_CHUNK_GROUPS = 1 << 10
"""Groups a thread takes at a time."""


class Activations(NamedTuple):
    """What is known of T rows, padded with zeros to whole groups: K columns."""

    addresses: tuple[int, int, int, int]
    """As the last fields of a `Job` have them:

    (T, K) float32, int8, or int16: then of each group first the 16 even ones, then the 16 odd ones;
    (T, K / 32) float32: what one step of the integers stands for;
    (T, K / 32) float32: the sum of each group, as rounded;
    (T, K / 16) float32: the sum of each half of a group.
    """
    memory: tuple[torch.Tensor, ...]
    """What the addresses point into."""


def prepare(x: torch.Tensor, precision: str) -> Activations:
    """x (T, K) float32, contiguous, for the kernels of a precision: as it is, or rounded to 16 or 8 bits."""
    if rest := x.shape[1] % GROUP:
        x = torch.nn.functional.pad(x, (0, GROUP - rest))
    count, groups = x.numel(), x.numel() // GROUP
    memory = torch.empty(4 * count + 16 * groups, dtype=torch.uint8)  # torch aligns to 64 bytes: loads cross no lines
    address = memory.data_ptr()
    scales = address + BYTES[precision] * count
    source, places = x.data_ptr(), (scales, scales + 4 * groups, scales + 8 * groups)
    run([Job(_kernel(precision), groups, _CHUNK_GROUPS, GROUP, 0, 0, address, 0, 0, 0, source, *places)])
    return Activations((source if precision == "exact" else address, *places), (x, memory))


@functools.cache
def _kernel(precision: str) -> int:
    """Address of the kernel (see `jobs`) whose rows are groups of activations."""
    itemsize = BYTES[precision]

    def emit(emitter: Emitter, job: dict[str, ir.Value], first: ir.Value, last: ir.Value) -> None:
        with emitter.loop(first, last) as group:
            place = emitter.at(job["x"], group, 4 * GROUP)
            parts = [emitter.load(emitter.move(place, 32 * i), F32, 8) for i in range(4)]
            if precision == "exact":
                halves = [emitter.sum(parts[i] + parts[i + 1]) for i in (0, 2)]
            else:
                parts, scale = _round(emitter, parts, itemsize)
                emitter.store(_arrange(emitter, parts, itemsize), emitter.at(job["y"], group, itemsize * GROUP))
                emitter.store(scale, emitter.at(job["x_scales"], group, 4))
                halves = [emitter.sum(parts[i] + parts[i + 1]).float() * scale for i in (0, 2)]
            emitter.store(halves[0] + halves[1], emitter.at(job["x_sums"], group, 4))
            emitter.store(emitter.concat(*halves), emitter.at(job["x_half_sums"], group, 8))

    return compile_kernel(f"prepare_{precision}", emit)


def _round(emitter: Emitter, parts: list[Vector], itemsize: int) -> tuple[list[Vector], Vector]:
    """A group's activations as integers of 32 bits, and what one step of them stands for."""
    limit = float((1 << (8 * itemsize - 1)) - 1)
    # Magnitudes keep their order read as integers; NaN, which no comparison of floats would keep, comes out on top.
    magnitudes = [part.bitcast(I32) & 0x7FFFFFFF for part in parts]
    largest = emitter.largest(functools.reduce(emitter.maximum, magnitudes)).bitcast(F32)
    # Otherwise all become zeros: of the scale's own size, or infinity times zero, which is NaN as it should be.
    usable = (largest > 1e-30) & (largest < float("inf"))
    inverse = emitter.select(usable, emitter.number(limit) / largest, emitter.number(0.0))
    parts = [emitter.select(usable, part, emitter.number(0.0)) * inverse for part in parts]
    return [emitter.round(part) for part in parts], largest / limit


def _arrange(emitter: Emitter, integers: list[Vector], itemsize: int) -> Vector:
    """A group's integers in their own width and the order that the kernels want."""
    together = emitter.concat(*integers)
    if itemsize == 2:
        together = together.lanes([*range(0, GROUP, 2), *range(1, GROUP, 2)])
    return together.truncate(I16 if itemsize == 2 else I8)
