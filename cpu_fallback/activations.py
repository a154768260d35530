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
PANEL_COLUMNS = 256
"""Columns of a panel that are rounded by one step for each row."""
_CHUNK_GROUPS = 1 << 10
"""Groups a thread takes at a time."""


class Activations(NamedTuple):
    """What is known of T rows, padded with zeros to whole groups: K columns."""

    addresses: tuple[int, int, int, int]
    """As the last fields of a `Job` have them:

    (T, K) float32, int8, or int16, these in the order that `vectors.words` has within a group;
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


def prepare_panels(x: torch.Tensor) -> Activations:
    """x (T, K) float32, contiguous, K in whole groups, in panels of L rows; past the last row, it is repeated.

    Here a step of the 16-bit integers is that of a stretch of PANEL_COLUMNS columns. The addresses are those of
    (panels, K / 2, L, 2) int16, each group's pairs in the order of a row of `prepare`, and of float32: the steps
    (panels, stretches, L), in them the sums of groups (panels, K / 32, L) and of half groups (panels, K / 16, L).
    """
    lanes, groups = panel_rows(), x.shape[1] // GROUP
    panels, stretches = -(-len(x) // lanes), -(-x.shape[1] // PANEL_COLUMNS)
    sizes = [panels * lanes * size for size in (2 * GROUP * groups, 4 * stretches, 4 * groups, 8 * groups)]
    memory = torch.empty(sum(sizes), dtype=torch.uint8)
    places = [memory.data_ptr() + sum(sizes[:i]) for i in range(4)]
    chunk = _CHUNK_GROUPS * GROUP // PANEL_COLUMNS // lanes
    run([Job(_panel_kernel(), panels * stretches, chunk, x.shape[1], x.data_ptr(), 0, 0, 0, len(x), 0, *places)])
    return Activations(tuple(places), (memory,))


@functools.cache
def panel_rows() -> int:
    """Rows of a panel on this machine."""
    from numba.core.registry import cpu_target

    return widest(cpu_target.target_context.codegen().magic_tuple()[2])


@functools.cache
def _panel_kernel() -> int:
    """Address of the kernel (see `jobs`) whose rows are the stretches of each panel in turn; x is its weights."""
    most = PANEL_COLUMNS // GROUP

    def emit(e: Emitter, job: dict[str, ir.Value], first: ir.Value, last: ir.Value) -> None:
        builder, lanes = e.builder, e.lanes
        buffer = e.buffer(lanes * 2 * PANEL_COLUMNS)
        groups = builder.udiv(job["columns"], I64(GROUP))
        stretches = builder.udiv(builder.add(groups, I64(most - 1)), I64(most))
        with e.loop(first, last) as row:
            panel = builder.udiv(row, stretches)
            begin = builder.mul(builder.urem(row, stretches), I64(most))
            count = e.least(builder.sub(groups, begin), I64(most))
            begin = builder.add(builder.mul(panel, groups), begin)  # among the groups of all panels
            with e.loop(I64(0), I64(lanes)) as lane:
                of_x = e.least(builder.add(builder.mul(panel, I64(lanes)), lane), builder.sub(job["tokens"], I64(1)))
                start = builder.add(builder.mul(builder.sub(of_x, panel), groups), begin)
                place = e.variable(e.zeros(I32, 8))
                with e.loop(I64(0), count) as i:
                    parts = _load_group(e, job["weights"], builder.add(start, i))
                    builder.store(e.maximum(Vector(e, builder.load(place)), _magnitudes(e, parts)).value, place)
                largest = e.largest(Vector(e, builder.load(place))).bitcast(F32)
                with e.loop(I64(0), count) as i:
                    parts = _rounded(e, _load_group(e, job["weights"], builder.add(start, i)), largest, 2)
                    number = builder.add(builder.mul(lane, I64(most)), i)
                    e.store(_arrange(e, parts, 2), e.move(buffer, builder.mul(number, I64(2 * GROUP))))
                    halves = [half.float() for half in _half_sums(e, parts)]
                    number = builder.mul(builder.add(begin, i), I64(lanes))
                    e.store(halves[0] + halves[1], e.at(job["x_sums"], builder.add(number, lane), 4))
                    number = builder.add(builder.mul(number, I64(2)), lane)
                    for half, value in enumerate(halves):
                        e.store(value, e.at(job["x_half_sums"], builder.add(number, I64(half * lanes)), 4))
                number = builder.add(builder.mul(row, I64(lanes)), lane)
                e.store(largest / _limit(2), e.at(job["x_scales"], number, 4))
            with e.loop(I64(0), count) as i:
                source = e.move(buffer, builder.mul(i, I64(2 * GROUP)))
                target = e.at(job["x"], builder.add(begin, i), 2 * GROUP * lanes)
                pairs = [e.load(e.move(source, 2 * PANEL_COLUMNS * lane), I32, GROUP // 2) for lane in range(lanes)]
                for lane, vector in enumerate(e.transpose(pairs)):
                    e.store(vector, e.move(target, 2 * GROUP * lane))

    return compile_kernel("prepare_panels", emit)


@functools.cache
def _kernel(precision: str) -> int:
    """Address of the kernel (see `jobs`) whose rows are groups of activations."""
    itemsize = BYTES[precision]

    def emit(emitter: Emitter, job: dict[str, ir.Value], first: ir.Value, last: ir.Value) -> None:
        with emitter.loop(first, last) as group:
            parts = _load_group(emitter, job["x"], group)
            if precision == "exact":
                halves = _half_sums(emitter, parts)
            else:
                largest = emitter.largest(_magnitudes(emitter, parts)).bitcast(F32)
                parts, scale = _rounded(emitter, parts, largest, itemsize), largest / _limit(itemsize)
                emitter.store(_arrange(emitter, parts, itemsize), emitter.at(job["y"], group, itemsize * GROUP))
                emitter.store(scale, emitter.at(job["x_scales"], group, 4))
                halves = [half.float() * scale for half in _half_sums(emitter, parts)]
            emitter.store(halves[0] + halves[1], emitter.at(job["x_sums"], group, 4))
            emitter.store(emitter.concat(*halves), emitter.at(job["x_half_sums"], group, 8))

    return compile_kernel(f"prepare_{precision}", emit)


def _load_group(emitter: Emitter, x: ir.Value, group: ir.Value) -> list[Vector]:
    place = emitter.at(x, group, 4 * GROUP)
    return [emitter.load(emitter.move(place, 32 * i), F32, 8) for i in range(4)]


def _half_sums(emitter: Emitter, parts: list[Vector]) -> list[Vector]:
    return [emitter.sum(parts[i] + parts[i + 1]) for i in (0, 2)]


def _magnitudes(emitter: Emitter, parts: list[Vector]) -> Vector:
    """The largest of some lanes each, as bits: their order is that of the numbers.

    NaN, which no comparison of floats would keep, comes out on top.
    """
    return functools.reduce(emitter.maximum, [part.bitcast(I32) & 0x7FFFFFFF for part in parts])


def _limit(itemsize: int) -> float:
    """The integer that the largest activation becomes."""
    return float((1 << (8 * itemsize - 1)) - 1)


def _rounded(emitter: Emitter, parts: list[Vector], largest: Vector, itemsize: int) -> list[Vector]:
    """Activations as integers of 32 bits, in steps of `largest` / `_limit`."""
    # Otherwise all become zeros: of the step's own size, or infinity times zero, which is NaN as it should be.
    usable = (largest > 1e-30) & (largest < float("inf"))
    inverse = emitter.select(usable, emitter.number(_limit(itemsize)) / largest, emitter.number(0.0))
    return [emitter.round(emitter.select(usable, part, emitter.number(0.0)) * inverse) for part in parts]


def _arrange(emitter: Emitter, integers: list[Vector], itemsize: int) -> Vector:
    """A group's integers in their own width and the order that the kernels want."""
    together = emitter.concat(*integers)
    if itemsize == 2 and emitter.lanes == 8:  # as `vectors.words` has the weights
        together = together.lanes([*range(0, GROUP, 2), *range(1, GROUP, 2)])
    return together.truncate(I16 if itemsize == 2 else I8)
