"""The machine code of products with many rows of activations: weights decoded once, met by whole panels of tokens.

A tile is some rows of weights: a stretch of its columns is decoded to 16-bit integers, small enough for the nearest
cache, and multiplied by all tokens before the next. The activations wait in panels: as many tokens as a vector has
lanes, so that two neighbouring columns of all of them are one load. Two such weights go into all lanes, and one
instruction (or two) adds the products of both to the sums of a panel. Four rows of weights and some panels share their
loads; the integer sums of a group stay in registers until they become float32, times the scales of both.

A group's sums hold at most 32 * 128 * 32767, like those of `rowdot`, whose formats and rounding these are. The order of
the columns within a group is that of `activations.arrange`, on both sides.
"""

from __future__ import annotations

import functools

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from trichord.cpu_fallback.decode import DECODERS, GROUP, chunk
from trichord.cpu_fallback.dequantize import NumpyBlock
from trichord.cpu_fallback.jobs import compile_kernel
from trichord.cpu_fallback.rowdot import without_zero
from trichord.cpu_fallback.vectors import F32, I16, I32, I64, Emitter, LlvmBlock, Vector, even_odd
from trichord.weight_format import WeightFormat

TILE_ROWS = 32
"""Rows of weights of a tile."""
_ROWS = 4
"""Rows of weights whose sums are in registers together."""
_COLUMNS = 256
"""Columns decoded together: a block of the largest formats."""
_TOKENS = 512
"""Tokens whose sums wait together, 64 KiB of them; more tokens take turns, for which weights are decoded anew."""


def _panels_together(emitter: Emitter) -> tuple[int, ...]:
    """Panels that a row's weights meet at once: 16 or 8 sums, of 32 or 16 registers; then fewer for the rest."""
    return (4, 2, 1) if emitter.lanes == 16 else (2, 1)


@functools.cache
def tile_kernel(format: WeightFormat) -> int:
    """Address of the kernel (see `jobs`) that multiplies rows by all tokens, in panels (see `activations`)."""
    return compile_kernel(f"tile_{format.name}", lambda e, job, *rows: _Tile(e, job, format).emit(*rows))


class _Tile:
    def __init__(self, emitter: Emitter, job: dict[str, ir.Value], format: WeightFormat) -> None:
        self.emitter, self.builder, self.job, self.format = emitter, emitter.builder, job, format
        self.lanes = emitter.lanes
        self.weights, self.size = chunk(format)
        decoded = DECODERS[format](NumpyBlock(np.zeros((1, self.size), np.uint8)))
        self.halves = max(1, decoded.scales.shape[1] * GROUP // self.weights)
        self.with_minimums = decoded.minimums is not None
        self.integers = emitter.buffer(TILE_ROWS * _COLUMNS * 2)
        self.factors, self.minimums = (emitter.buffer(TILE_ROWS * self._factors_of_row() * 4) for _ in range(2))
        self.sums = emitter.buffer(TILE_ROWS * _TOKENS * 4)

    def _factors_of_row(self) -> int:
        return _COLUMNS // GROUP * self.halves

    def emit(self, first: ir.Value, last: ir.Value) -> None:
        """The kernel's body, for at most TILE_ROWS rows."""
        builder, emitter = self.builder, self.emitter
        count = builder.sub(last, first)
        rows = builder.and_(builder.add(count, I64(_ROWS - 1)), I64(-_ROWS))  # past the last one, it is repeated
        chunks = builder.udiv(self.job["columns"], I64(self.weights))
        together = _COLUMNS // self.weights
        turns = builder.udiv(builder.add(self.job["tokens"], I64(_TOKENS - 1)), I64(_TOKENS))
        with emitter.loop(I64(0), turns) as turn:
            token = builder.mul(turn, I64(_TOKENS))
            tokens = emitter.least(builder.sub(self.job["tokens"], token), I64(_TOKENS))
            cgutils.memset(builder, self.sums, builder.mul(rows, I64(_TOKENS * 4)), 0)
            stretches = builder.udiv(builder.add(chunks, I64(together - 1)), I64(together))
            with emitter.loop(I64(0), stretches) as stretch:
                begin = builder.mul(stretch, I64(together))
                end = emitter.least(builder.add(begin, I64(together)), chunks)
                with emitter.loop(I64(0), rows) as i:
                    row = emitter.least(builder.add(first, i), builder.sub(last, I64(1)))
                    self._decode(i, row, begin, end)
                groups = builder.mul(builder.sub(end, begin), I64(self.weights // GROUP))
                group = builder.mul(begin, I64(self.weights // GROUP))
                self._multiply(rows, token, tokens, group, groups)
            self._write(first, count, token, tokens)

    def _decode(self, i: ir.Value, row: ir.Value, begin: ir.Value, end: ir.Value) -> None:
        """These chunks of a row, as the tile's row i."""
        builder, emitter = self.builder, self.emitter
        start = emitter.at(self.job["weights"], builder.mul(row, self.job["row_bytes"]), 1)
        factors = self.weights // GROUP * self.halves  # of a chunk
        with emitter.loop(begin, end) as number:
            pointer = emitter.move(start, builder.mul(number, I64(self.size)))
            quants, scales, minimums, _ = without_zero(DECODERS[self.format](LlvmBlock(emitter, pointer)))
            number = builder.sub(number, begin)
            target = builder.add(builder.mul(i, I64(_COLUMNS)), builder.mul(number, I64(self.weights)))
            for group, quant in enumerate(quants):
                for part, words in enumerate(even_odd(quant)):
                    place = emitter.move(self.integers, builder.mul(target, I64(2)))
                    emitter.store(words, emitter.move(place, 64 * group + 32 * part))
            target = builder.add(builder.mul(i, I64(self._factors_of_row())), builder.mul(number, I64(factors)))
            for vector, memory in ((scales, self.factors), (minimums, self.minimums)):
                if vector is not None:
                    vector = vector.lanes([k * vector.count // factors for k in range(factors)])
                    emitter.store(vector, emitter.move(memory, builder.mul(target, I64(4))))

    def _multiply(self, rows: ir.Value, token: ir.Value, tokens: ir.Value, group: ir.Value, groups: ir.Value) -> None:
        """Adds the products of the decoded groups, `group` the first, with all panels of these tokens."""
        builder, emitter = self.builder, self.emitter
        first = builder.udiv(token, I64(self.lanes))
        panels = builder.udiv(builder.add(tokens, I64(self.lanes - 1)), I64(self.lanes))
        done = I64(0)
        for together in _panels_together(emitter):
            count = builder.udiv(builder.sub(panels, done), I64(together))
            with (
                emitter.loop(I64(0), count) as i,
                emitter.loop(I64(0), builder.udiv(rows, I64(_ROWS))) as quad,
                emitter.loop(I64(0), groups) as g,
            ):
                panel = builder.add(done, builder.mul(i, I64(together)))
                self._meet(builder.mul(quad, I64(_ROWS)), panel, builder.add(first, panel), together, group, g)
            done = builder.add(done, builder.mul(count, I64(together)))

    def _meet(
        self, row: ir.Value, place: ir.Value, panel: ir.Value, together: int, first: ir.Value, g: ir.Value
    ) -> None:
        """Group g of the decoded ones, of _ROWS rows, meets panels; their sums are number `place` and following."""
        builder, emitter, lanes = self.builder, self.emitter, self.lanes
        groups = builder.udiv(self.job["columns"], I64(GROUP))
        numbers = [  # of the group, in each panel
            builder.add(builder.mul(builder.add(panel, I64(p)), groups), builder.add(first, g)) for p in range(together)
        ]
        x = [emitter.at(self.job["x"], number, 2 * GROUP * lanes) for number in numbers]
        quants = builder.add(builder.mul(row, I64(2 * _COLUMNS)), builder.mul(g, I64(2 * GROUP)))
        quants = emitter.move(self.integers, quants)
        steps = GROUP // 2 // self.halves
        for half in range(self.halves):
            totals = [[emitter.zeros(I32, lanes) for _ in range(together)] for _ in range(_ROWS)]
            for step in self._steps(half, steps):
                panels = [emitter.load(emitter.move(p, 4 * lanes * step), I16, 2 * lanes) for p in x]
                for r in range(_ROWS):
                    pair = emitter.load(emitter.move(quants, 2 * _COLUMNS * r + 4 * step), I32).widen(lanes)
                    pair = pair.bitcast(I16)
                    for p in range(together):
                        totals[r][p] = totals[r][p] + emitter.multiply_pairs(panels[p], pair)
            for r in range(_ROWS):
                number = builder.add(builder.mul(g, I64(self.halves)), I64(half))
                number = builder.add(builder.mul(builder.add(row, I64(r)), I64(self._factors_of_row())), number)
                scale = emitter.load(emitter.move(self.factors, builder.mul(number, I64(4))), F32).widen(lanes)
                for p in range(together):
                    sums = builder.add(
                        builder.mul(builder.add(row, I64(r)), I64(_TOKENS)),
                        builder.mul(builder.add(place, I64(p)), I64(lanes)),
                    )
                    target = emitter.move(self.sums, builder.mul(sums, I64(4)))
                    of_x = emitter.load(emitter.at(self.job["x_scales"], numbers[p], 4 * lanes), F32, lanes)
                    total = emitter.load(target, F32, lanes)
                    total = emitter.multiply_add(totals[r][p].as_signed().float(), scale * of_x, total)
                    if self.with_minimums:
                        minimum = emitter.load(emitter.move(self.minimums, builder.mul(number, I64(4))), F32)
                        base, index = self.job["x_sums"], numbers[p]
                        if self.halves == 2:
                            base, index = self.job["x_half_sums"], builder.add(builder.mul(index, I64(2)), I64(half))
                        of_x = emitter.load(emitter.at(base, index, 4 * lanes), F32, lanes)
                        total = emitter.multiply_add((minimum * -1.0).widen(lanes), of_x, total)
                    emitter.store(total, target)

    def _steps(self, half: int, steps: int) -> list[int]:
        """Pairs of a group's columns in the order of `arrange`: the even ones first, then the odd ones."""
        if self.halves == 1:
            return list(range(steps))
        return [start + step for start in (0, 8) for step in range(4 * half, 4 * half + 4)]

    def _write(self, first: ir.Value, count: ir.Value, token: ir.Value, tokens: ir.Value) -> None:
        """The sums of all rows, to the results."""
        builder, emitter = self.builder, self.emitter
        quads = builder.udiv(count, I64(_ROWS))
        rest = builder.mul(quads, I64(_ROWS))

        def source(row: ir.Value, i: ir.Value) -> Vector:
            place = builder.add(builder.mul(row, I64(_TOKENS)), i)
            return emitter.load(emitter.move(self.sums, builder.mul(place, I64(4))), F32)

        def target(row: ir.Value, i: ir.Value) -> ir.Value:
            place = builder.mul(builder.add(token, i), self.job["y_stride"])
            return emitter.at(self.job["y"], builder.add(builder.add(first, row), place), 4)

        with emitter.loop(I64(0), quads) as quad, emitter.loop(I64(0), tokens) as i:
            row = builder.mul(quad, I64(_ROWS))
            numbers = [source(builder.add(row, I64(r)), i) for r in range(_ROWS)]
            emitter.store(emitter.concat(*numbers), target(row, i))
        with emitter.loop(rest, count) as row, emitter.loop(I64(0), tokens) as i:
            emitter.store(source(row, i), target(row, i))
