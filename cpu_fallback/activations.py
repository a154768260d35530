"""Activations as the kernels of products read them: rounded to 16 or 8 bits in groups of 32, with scales and sums.

`rowdot` takes rows, `tiledot` panels: as many rows side by side as a vector has lanes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from llvmlite import ir

from trichord.cpu_fallback.decode import GROUP
from trichord.cpu_fallback.jobs import Job, compile_kernel, run
from trichord.cpu_fallback.vectors import F32, I8, I16, I32, I64, Emitter, Vector, widest

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
            parts = _load_group(emitter, place)
            if precision == "exact":
                halves = [emitter.sum(parts[i] + parts[i + 1]) for i in (0, 2)]
            else:
                parts, scale, halves = _round(emitter, parts, itemsize)
                emitter.store(_arrange(emitter, parts, itemsize), emitter.at(job["y"], group, itemsize * GROUP))
                emitter.store(scale, emitter.at(job["x_scales"], group, 4))
            emitter.store(halves[0] + halves[1], emitter.at(job["x_sums"], group, 4))
            emitter.store(emitter.concat(*halves), emitter.at(job["x_half_sums"], group, 8))

    return compile_kernel(f"prepare_{precision}", emit)


def prepare_panels(x: torch.Tensor) -> Activations:
    """x (T, K) float32, contiguous, K in whole groups, in panels of L rows; past the last row, it is repeated.

    The addresses are those of (panels, K / 2, L, 2) int16, each group's pairs in the order of its rows in `prepare`,
    and of float32 (panels, K / 32, L) scales, as many sums, and (panels, K / 16, L) sums of halves.
    """
    lanes, groups = panel_rows(), x.shape[1] // GROUP
    panels = -(-len(x) // lanes)
    count = panels * groups * lanes
    memory = torch.empty(count * (2 * GROUP + 16), dtype=torch.uint8)
    address = memory.data_ptr()
    scales = address + 2 * GROUP * count
    places = address, scales, scales + 4 * count, scales + 8 * count
    chunk = _CHUNK_GROUPS // lanes
    run([Job(_panel_kernel(), panels * groups, chunk, x.shape[1], x.data_ptr(), 0, 0, 0, len(x), 0, *places)])
    return Activations(places, (memory,))


@functools.cache
def panel_rows() -> int:
    """Rows of a panel on this machine."""
    from numba.core.registry import cpu_target

    return widest(cpu_target.target_context.codegen().magic_tuple()[2])


@functools.cache
def _panel_kernel() -> int:
    """Address of the kernel (see `jobs`) whose rows are the groups of one panel after the other; x is its weights."""

    def emit(e: Emitter, job: dict[str, ir.Value], first: ir.Value, last: ir.Value) -> None:
        builder, lanes = e.builder, e.lanes
        buffer = e.buffer(lanes * 2 * GROUP)
        groups = builder.udiv(job["columns"], I64(GROUP))
        with e.loop(first, last) as row:
            panel, group = builder.udiv(row, groups), builder.urem(row, groups)
            start = builder.mul(row, I64(lanes))
            with e.loop(I64(0), I64(lanes)) as lane:
                of_x = e.least(builder.add(builder.mul(panel, I64(lanes)), lane), builder.sub(job["tokens"], I64(1)))
                number = builder.add(builder.mul(of_x, job["columns"]), builder.mul(group, I64(GROUP)))
                parts, scale, halves = _round(e, _load_group(e, e.at(job["weights"], number, 4)), 2)
                e.store(_arrange(e, parts, 2), e.move(buffer, builder.mul(lane, I64(2 * GROUP))))
                number = builder.add(start, lane)
                e.store(scale, e.at(job["x_scales"], number, 4))
                e.store(halves[0] + halves[1], e.at(job["x_sums"], number, 4))
                for half, value in enumerate(halves):
                    of_half = builder.add(builder.add(start, number), I64(half * lanes))
                    e.store(value, e.at(job["x_half_sums"], of_half, 4))
            pairs = [e.load(e.move(buffer, 2 * GROUP * lane), I32, GROUP // 2) for lane in range(lanes)]
            for i, vector in enumerate(e.transpose(pairs)):
                e.store(vector, e.move(e.at(job["x"], start, 2 * GROUP), 2 * GROUP * i))

    return compile_kernel("prepare_panels", emit)


def _load_group(emitter: Emitter, pointer: ir.Value) -> list[Vector]:
    return [emitter.load(emitter.move(pointer, 32 * i), F32, 8) for i in range(4)]


def _round(emitter: Emitter, parts: list[Vector], itemsize: int) -> tuple[list[Vector], Vector, list[Vector]]:
    """A group's activations as integers of 32 bits, what one step of them stands for, and the sums of both halves."""
    limit = float((1 << (8 * itemsize - 1)) - 1)
    # Magnitudes keep their order read as integers; NaN, which no comparison of floats would keep, comes out on top.
    magnitudes = [part.bitcast(I32) & 0x7FFFFFFF for part in parts]
    largest = emitter.largest(functools.reduce(emitter.maximum, magnitudes)).bitcast(F32)
    # Otherwise all become zeros: of the scale's own size, or infinity times zero, which is NaN as it should be.
    usable = (largest > 1e-30) & (largest < float("inf"))
    inverse = emitter.select(usable, emitter.number(limit) / largest, emitter.number(0.0))
    parts = [emitter.select(usable, part, emitter.number(0.0)) * inverse for part in parts]
    parts, scale = [emitter.round(part) for part in parts], largest / limit
    return parts, scale, [emitter.sum(parts[i] + parts[i + 1]).float() * scale for i in (0, 2)]


def _arrange(emitter: Emitter, integers: list[Vector], itemsize: int) -> Vector:
    """A group's integers in their own width and the order that the kernels want."""
    together = emitter.concat(*integers)
    if itemsize == 2:
        together = together.lanes([*range(0, GROUP, 2), *range(1, GROUP, 2)])
    return together.truncate(I16 if itemsize == 2 else I8)
