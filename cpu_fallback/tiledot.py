"""The machine code of products with many rows of activations: weights decoded once, met by whole panels of tokens.

A tile is some rows of weights: a stretch of its columns is decoded to 16-bit integers, small enough for the nearest
cache, and multiplied by all tokens before the next. The activations wait in panels: as many tokens as a vector has
lanes, so that two neighbouring columns of all of them are one load. Two such weights go into all lanes, and one
instruction (or two) adds the products of both to the sums of a panel. Some rows of weights and some panels share their
loads; the integer sums of a group stay in registers until they become float32, times the weights' scale, and all of a
stretch until they are multiplied by the activations' one.

A group's sums hold at most 32 * 128 * 32767, like those of `rowdot`. The order of the columns within a group is the one
that both `words` and the activations have.
"""

from __future__ import annotations

import functools

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from trichord.cpu_fallback.activations import PANEL_COLUMNS
from trichord.cpu_fallback.decode import DECODERS, GROUP, chunk
from trichord.cpu_fallback.dequantize import NumpyBlock
from trichord.cpu_fallback.jobs import compile_kernel
from trichord.cpu_fallback.rowdot import without_zero
from trichord.cpu_fallback.vectors import F32, I16, I32, I64, Emitter, LlvmBlock, Vector, words
from trichord.weight_format import WeightFormat

TILE_ROWS = 32
"""Rows of weights of a tile."""
_TOKENS = 512
"""Tokens whose sums wait together, 64 KiB of them; more tokens take turns, for which weights are decoded anew."""
_SHAPES = {16: (8, (2, 1)), 8: (2, (2, 1))}
"""By the lanes of a vector: rows of weights, and panels that meet at once; fewer for the last ones (measured).

Their sums, of integers and of floats, about fill the 32 or 16 registers.
"""


@functools.cache
def tile_kernel(format: WeightFormat) -> int:
    """Address of the kernel (see `jobs`) that multiplies rows by all tokens, in panels (see `activations`)."""
    return compile_kernel(f"tile_{format.name}", lambda e, job, *rows: _Tile(e, job, format).emit(*rows))


class _Panel:
    """A stretch of a panel, as `activations.prepare_panels` lays it."""

    def __init__(self, tile: _Tile, panel: ir.Value, stretch: ir.Value) -> None:
        self.emitter, self.builder, self.lanes = tile.emitter, tile.builder, tile.lanes
        builder = self.builder
        columns = builder.mul(panel, tile.job["columns"])  # before this panel
        stretches = builder.udiv(builder.add(tile.job["columns"], I64(PANEL_COLUMNS - 1)), I64(PANEL_COLUMNS))
        steps = builder.add(builder.mul(panel, stretches), stretch)
        columns = builder.add(columns, builder.mul(stretch, I64(PANEL_COLUMNS)))
        sums = "x_half_sums" if tile.halves == 2 else "x_sums"
        self._x = self.emitter.at(tile.job["x"], columns, 2 * self.lanes)
        self._sums = self.emitter.at(tile.job[sums], builder.udiv(columns, I64(GROUP // tile.halves)), 4 * self.lanes)
        self._steps = self.emitter.at(tile.job["x_scales"], steps, 4 * self.lanes)

    def pairs(self, group: ir.Value, step: int) -> Vector:
        """Two columns of all rows."""
        start = self.emitter.move(self._x, self.builder.mul(group, I64(2 * GROUP * self.lanes)))
        return self.emitter.load(self.emitter.move(start, 4 * self.lanes * step), I16, 2 * self.lanes)

    def sums(self, number: ir.Value) -> Vector:
        """The sums of a group or a half of one."""
        place = self.emitter.move(self._sums, self.builder.mul(number, I64(4 * self.lanes)))
        return self.emitter.load(place, F32, self.lanes)

    def steps(self) -> Vector:
        """What one step of the integers stands for, and of the sums."""
        return self.emitter.load(self._steps, F32, self.lanes)


class _Tile:
    def __init__(self, emitter: Emitter, job: dict[str, ir.Value], format: WeightFormat) -> None:
        self.emitter, self.builder, self.job, self.format = emitter, emitter.builder, job, format
        self.lanes = emitter.lanes
        self.rows, self.together = _SHAPES[self.lanes]
        self.weights, self.size = chunk(format)
        decoded = DECODERS[format](NumpyBlock(np.zeros((1, self.size), np.uint8)))
        self.halves = max(1, decoded.scales.shape[1] * GROUP // self.weights)
        self.with_minimums = decoded.minimums is not None
        self.integers = emitter.buffer(TILE_ROWS * PANEL_COLUMNS * 2)
        self.factors, self.minimums = (emitter.buffer(TILE_ROWS * self._factors_of_row() * 4) for _ in range(2))
        self.sums = emitter.buffer(TILE_ROWS * _TOKENS * 4)
        self.turned = emitter.buffer(self.lanes * self.lanes * 4)

    def _factors_of_row(self) -> int:
        return PANEL_COLUMNS // GROUP * self.halves

    def emit(self, first: ir.Value, last: ir.Value) -> None:
        """The kernel's body, for at most TILE_ROWS rows."""
        builder, emitter = self.builder, self.emitter
        count = builder.sub(last, first)
        # In whole runs of self.rows: past the last row, it is repeated.
        rows = builder.and_(builder.add(count, I64(self.rows - 1)), I64(-self.rows))
        chunks = builder.udiv(self.job["columns"], I64(self.weights))
        together = PANEL_COLUMNS // self.weights
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
                self._multiply(rows, turn, tokens, stretch, groups)
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
            target = builder.add(builder.mul(i, I64(PANEL_COLUMNS)), builder.mul(number, I64(self.weights)))
            for group, quant in enumerate(quants):
                for part, vector in enumerate(words(quant)):
                    place = emitter.move(self.integers, builder.mul(target, I64(2)))
                    emitter.store(vector, emitter.move(place, 2 * GROUP * group + 32 * part))
            target = builder.add(builder.mul(i, I64(self._factors_of_row())), builder.mul(number, I64(factors)))
            for vector, memory in ((scales, self.factors), (minimums and minimums * -1.0, self.minimums)):
                if vector is not None:
                    vector = vector.lanes([k * vector.count // factors for k in range(factors)])
                    emitter.store(vector, emitter.move(memory, builder.mul(target, I64(4))))

    def _multiply(self, rows: ir.Value, turn: ir.Value, tokens: ir.Value, stretch: ir.Value, groups: ir.Value) -> None:
        """Adds the products of the decoded groups with all panels of these tokens."""
        builder, emitter = self.builder, self.emitter
        panels = builder.udiv(builder.add(tokens, I64(self.lanes - 1)), I64(self.lanes))
        done = I64(0)
        for together in self.together:
            count = builder.udiv(builder.sub(panels, done), I64(together))
            with (
                emitter.loop(I64(0), count) as i,
                emitter.loop(I64(0), builder.udiv(rows, I64(self.rows))) as few,
            ):
                place = builder.add(done, builder.mul(i, I64(together)))
                first = builder.add(place, builder.mul(turn, I64(_TOKENS // self.lanes)))
                of_x = [_Panel(self, builder.add(first, I64(p)), stretch) for p in range(together)]
                self._meet(builder.mul(few, I64(self.rows)), of_x, place, groups)
            done = builder.add(done, builder.mul(count, I64(together)))

    def _meet(self, row: ir.Value, panels: list[_Panel], place: ir.Value, groups: ir.Value) -> None:
        """Some rows of the tile meet panels; these have the sums from number `place` on."""
        builder, emitter, lanes = self.builder, self.emitter, self.lanes
        size, pairs = self._factors_of_row(), GROUP // 2 // self.halves
        totals = [[emitter.variable(emitter.zeros(F32, lanes)) for _ in panels] for _ in range(self.rows)]
        quants, factors, minimums = (
            emitter.move(memory, builder.mul(row, I64(row_bytes)))
            for memory, row_bytes in (
                (self.integers, 2 * PANEL_COLUMNS),
                (self.factors, 4 * size),
                (self.minimums, 4 * size),
            )
        )
        with emitter.loop(I64(0), groups) as group:
            of_group = emitter.move(quants, builder.mul(group, I64(2 * GROUP)))
            for half in range(self.halves):
                sums = [[emitter.zeros(I32, lanes) for _ in panels] for _ in range(self.rows)]
                for step in range(pairs):
                    step = self._place(step, half)
                    x = [panel.pairs(group, step) for panel in panels]
                    for r in range(self.rows):
                        pair = emitter.load(emitter.move(of_group, 2 * PANEL_COLUMNS * r + 4 * step), I32)
                        pair = pair.widen(lanes).bitcast(I16)
                        for p in range(len(panels)):
                            sums[r][p] = sums[r][p] + emitter.multiply_pairs(x[p], pair)
                number = builder.add(builder.mul(group, I64(self.halves)), I64(half))
                of_row = builder.mul(number, I64(4))
                for r in range(self.rows):
                    for p, panel in enumerate(panels):
                        numbers = [(factors, sums[r][p].as_signed().float())]
                        if self.with_minimums:
                            numbers.append((minimums, panel.sums(number)))
                        total = Vector(emitter, builder.load(totals[r][p]))
                        for memory, vector in numbers:
                            factor = emitter.load(emitter.move(memory, builder.add(of_row, I64(4 * size * r))), F32)
                            total = emitter.multiply_add(vector, factor, total)
                        builder.store(total.value, totals[r][p])
        for r in range(self.rows):
            for p, panel in enumerate(panels):
                number = builder.mul(builder.add(place, I64(p)), I64(lanes))
                number = builder.add(builder.mul(builder.add(row, I64(r)), I64(_TOKENS)), number)
                target = emitter.move(self.sums, builder.mul(number, I64(4)))
                total = Vector(emitter, builder.load(totals[r][p]))
                total = emitter.multiply_add(total, panel.steps(), emitter.load(target, F32, lanes))
                emitter.store(total, target)

    def _place(self, step: int, half: int) -> int:
        """Which pair of a group is this one of a half, or of all of it."""
        if self.halves == 2 and self.lanes == 8:  # even ones of both halves, then odd ones of both
            return step // 4 * 8 + 4 * half + step % 4
        return 8 * half + step

    def _write(self, first: ir.Value, count: ir.Value, token: ir.Value, tokens: ir.Value) -> None:
        """The sums of all rows, to the results: as many rows as a vector has lanes, of a panel, are turned together."""
        builder, emitter, lanes = self.builder, self.emitter, self.lanes

        def source(row: ir.Value, i: ir.Value) -> ir.Value:
            return emitter.move(self.sums, builder.mul(builder.add(builder.mul(row, I64(_TOKENS)), i), I64(4)))

        def target(row: ir.Value, i: ir.Value) -> ir.Value:
            place = builder.mul(builder.add(token, i), self.job["y_stride"])
            return emitter.at(self.job["y"], builder.add(builder.add(first, row), place), 4)

        turns = builder.udiv(count, I64(lanes))
        panels = builder.udiv(builder.add(tokens, I64(lanes - 1)), I64(lanes))
        with emitter.loop(I64(0), panels) as panel, emitter.loop(I64(0), turns) as turn:
            row, start = builder.mul(turn, I64(lanes)), builder.mul(panel, I64(lanes))
            vectors = [emitter.load(source(builder.add(row, I64(r)), start), F32, lanes) for r in range(lanes)]
            for r, vector in enumerate(emitter.transpose(vectors)):
                emitter.store(vector, emitter.move(self.turned, 4 * lanes * r))
            with emitter.loop(I64(0), emitter.least(builder.sub(tokens, start), I64(lanes))) as i:
                vector = emitter.load(emitter.move(self.turned, builder.mul(i, I64(4 * lanes))), F32, lanes)
                emitter.store(vector, target(row, builder.add(start, i)))
        with emitter.loop(builder.mul(turns, I64(lanes)), count) as row, emitter.loop(I64(0), tokens) as i:
            emitter.store(emitter.load(source(row, i), F32), target(row, i))
