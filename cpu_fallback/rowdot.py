"""The machine code that reads packed blocks in place: products of rows with activations, and rows as float32.

One skeleton walks over rows and blocks; a format enters through its decode function alone (see `decode`), a precision
through the way a group of 32 weights meets 32 activations:

    exact    float32 weights times float32 activations
    default  16-bit activations: bytes become words, pairs of products are summed in 32 bits
    fast     8-bit activations: four products are summed in 32 bits

The integer sum of a group (at most 32 * 128 * 32767, which 31 bits hold) becomes float32 at once and is added up times
the product of both scales. All lanes of an accumulator are summed at the end of the row, so only scales care which
lane is which: the first half of them belongs to the first 16 weights of a group.
"""

from __future__ import annotations

import functools

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from trichord.cpu_fallback.activations import BYTES
from trichord.cpu_fallback.decode import DECODERS, GROUP, Decoded, chunk
from trichord.cpu_fallback.dequantize import NumpyBlock
from trichord.cpu_fallback.jobs import compile_kernel
from trichord.cpu_fallback.vectors import F32, I8, I16, I32, I64, Emitter, LlvmBlock, Vector, words
from trichord.weight_format import WeightFormat

_STRIDE = 256
"""Weights decoded together: short blocks are joined, so that their scales are multiplied as one vector."""
_SPAN, _MOST_FACTORS = 8, 16
"""Runs of _STRIDE weights that wait for their factors together, and how many numbers these may be of one run."""
_MOST_BITS_AHEAD = 6
"""Bits per weight from which on reading costs more time than the arithmetic, and is better not interrupted."""
_AHEAD = 4096
"""Bytes from what is decoded to what is fetched meanwhile: the CPU's own prefetching does not reach as far."""


@functools.cache
def dot_kernel(format: WeightFormat, precision: str, tokens: int) -> int:
    """Address of the kernel (see `jobs`) that multiplies rows of weights by activations, `tokens` rows at a time.

    A job's number of tokens must be a multiple of that. Float formats are multiplied in "exact" only.
    """
    name = f"dot_{format.name}_{precision}_{tokens}"
    return compile_kernel(name, lambda e, job, *rows: _Dot(e, job, format, precision, tokens).emit(*rows))


@functools.cache
def dequantize_kernel(format: WeightFormat) -> int:
    """Address of the kernel (see `jobs`) that writes rows of weights as float32, padded to whole groups of 32."""
    return compile_kernel(f"dequantize_{format.name}", lambda e, job, *rows: _Dequantize(e, job, format).emit(*rows))


class _Rows:
    """Emits the walk over rows and blocks; what happens to a block is the subclass's."""

    def __init__(self, emitter: Emitter, job: dict[str, ir.Value], format: WeightFormat) -> None:
        self.emitter, self.builder, self.job, self.format = emitter, emitter.builder, job, format
        self.decoder = DECODERS[format]

    def begin_row(self) -> None:
        """Before a row's first block."""

    def blocks(self, start: ir.Value, first: ir.Value, last: ir.Value, joined: int) -> None:
        """The runs of `joined` chunks from number `first` to before `last` of the row that begins at `start`."""
        weights, size = chunk(self.format)
        with self.emitter.loop(first, last) as i:
            pointer = self.emitter.move(start, self.builder.mul(i, I64(joined * size)))
            self.prefetch(pointer, joined * size)
            self.block(self._decode(pointer, joined), self.builder.mul(i, I64(joined * weights)))

    def prefetch(self, pointer: ir.Value, size: int) -> None:
        """Fetches what comes _AHEAD bytes after these."""
        for line in range(_AHEAD, _AHEAD + size, 64):
            self.emitter.prefetch(self.emitter.move(pointer, line))

    def block(self, decoded: Decoded, position: ir.Value) -> None:
        """The weights from column `position` on."""
        raise NotImplementedError

    def end_row(self) -> None:
        """After a row's last block."""

    def emit(self, first: ir.Value, last: ir.Value) -> None:
        """The kernel's body."""
        builder, emitter = self.builder, self.emitter
        weights, size = chunk(self.format)
        joined = _STRIDE // weights
        chunks = builder.udiv(self.job["columns"], I64(weights))
        strides = builder.udiv(chunks, I64(joined))
        with emitter.loop(first, last) as row:
            self.row = row
            start = emitter.at(self.job["weights"], builder.mul(row, self.job["row_bytes"]), 1)
            self.begin_row()
            self.blocks(start, I64(0), strides, joined)
            if joined > 1:
                self.blocks(start, builder.mul(strides, I64(joined)), chunks, 1)
            if self.format.block_size == 1:
                self._rest(start, builder.mul(chunks, I64(weights)), size // weights)
            self.end_row()

    def _decode(self, pointer: ir.Value, joined: int) -> Decoded:
        size = chunk(self.format)[1]
        blocks = [self.decoder(LlvmBlock(self.emitter, self.emitter.move(pointer, i * size))) for i in range(joined)]
        quants = [q for block in blocks for q in block.quants]
        scales, minimums = (
            None if parts[0] is None else self.emitter.concat(*parts)
            for parts in ([block[field] for block in blocks] for field in (1, 2))
        )
        return Decoded(quants, scales, minimums, blocks[0].zero)

    def _rest(self, start: ir.Value, position: ir.Value, itemsize: int) -> None:
        """The weights of a row after its whole groups: decoded from a copy padded with zeros, to stay inside."""
        builder = self.builder
        count = builder.sub(self.job["columns"], position)
        with builder.if_then(builder.icmp_unsigned(">", count, I64(0))):
            copy = cgutils.alloca_once(builder, I8, size=GROUP * itemsize)
            cgutils.memset(builder, copy, I64(GROUP * itemsize), 0)
            source = self.emitter.move(start, builder.mul(position, I64(itemsize)))
            cgutils.raw_memcpy(builder, copy, source, builder.mul(count, I64(itemsize)), 1)
            self.block(self._decode(copy, 1), position)


def without_zero(decoded: Decoded) -> Decoded:
    """The same weights by signed quants around 0."""
    if not decoded.zero:
        return decoded
    return decoded._replace(quants=[(quant - decoded.zero).as_signed() for quant in decoded.quants], zero=0)


class _Dequantize(_Rows):
    def block(self, decoded: Decoded, position: ir.Value) -> None:
        emitter, (quants, scales, minimums, _) = self.emitter, without_zero(decoded)
        start = self.builder.add(self.builder.mul(self.row, self.job["y_stride"]), position)
        target = emitter.at(self.job["y"], start, 4)
        for i in range(4 * len(quants)):
            values = quants[i // 4].lanes(range(i % 4 * 8, i % 4 * 8 + 8)).float()
            for parts, apply in ((scales, Vector.__mul__), (minimums, Vector.__sub__)):
                if parts is not None:
                    values = apply(values, parts.lanes([i * parts.count // (4 * len(quants))] * 8))
            emitter.store(values, emitter.move(target, 32 * i))


@functools.cache
def _scaled_ahead(format: WeightFormat) -> bool:
    """Whether factors wait in memory: not those of half groups, which are spread by a single instruction (measured)."""
    quants, scales, *_ = DECODERS[format](NumpyBlock(np.zeros((1, chunk(format)[1]), np.uint8)))
    return format.bits_per_weight < _MOST_BITS_AHEAD and scales is not None and scales.shape[1] <= len(quants)


class _Dot(_Rows):
    def __init__(
        self, emitter: Emitter, job: dict[str, ir.Value], format: WeightFormat, precision: str, tokens: int
    ) -> None:
        super().__init__(emitter, job, format)
        self.tokens, self.itemsize = range(tokens), BYTES[precision]
        self.lanes = emitter.lanes if precision == "default" else 8
        self.meet = {"exact": self._meet_floats, "default": self._meet_words, "fast": self._meet_bytes}[precision]
        count = I32(_MOST_FACTORS * _SPAN * tokens // 8)
        factors = cgutils.alloca_once(emitter.builder, ir.VectorType(F32, 8), size=count)  # aligned like its lanes
        self.factors = emitter.builder.bitcast(factors, I8.as_pointer())
        # A chain of additions waits for each one: a lone token gets several chains.
        self.sums = [
            [emitter.variable(emitter.number(0.0, self.lanes)) for _ in range(max(1, 4 // tokens))] for _ in self.tokens
        ]

    def emit(self, first: ir.Value, last: ir.Value) -> None:
        builder, count = self.builder, I64(len(self.tokens))
        padded = builder.and_(builder.add(self.job["columns"], I64(GROUP - 1)), I64(-GROUP))
        with self.emitter.loop(I64(0), builder.udiv(self.job["tokens"], count)) as i:
            pairs = [
                self.emitter.at(self.job["pairs"], builder.add(builder.mul(i, count), I64(token)), 16)
                for token in self.tokens
            ]
            self.starts = [builder.mul(self.emitter.load(pair, I64).value, padded) for pair in pairs]
            self.results = [
                builder.mul(self.emitter.load(self.emitter.move(pair, 8), I64).value, self.job["y_stride"])
                for pair in pairs
            ]
            super().emit(first, last)

    def begin_row(self) -> None:
        for place in (place for chains in self.sums for place in chains):
            self.builder.store(self.emitter.number(0.0, self.lanes).value, place)

    def end_row(self) -> None:
        for token in self.tokens:
            parts = [Vector(self.emitter, self.builder.load(place)) for place in self.sums[token]]
            total = self.emitter.sum(functools.reduce(Vector.__add__, parts))
            index = self.builder.add(self.results[token], self.row)
            self.emitter.store(total, self.emitter.at(self.job["y"], index, 4))

    def blocks(self, start: ir.Value, first: ir.Value, last: ir.Value, joined: int) -> None:
        """Twice over a span of them: for the scales and minimums, then for the quants.

        The factors of the groups wait in memory in between. To read a factor into all lanes costs no more than to read
        it, while to spread it from a vector's lane would keep those parts of the CPU busy that multiply.
        """
        if not _scaled_ahead(self.format):
            super().blocks(start, first, last, joined)
            return
        builder, emitter = self.builder, self.emitter
        weights, size = chunk(self.format)
        run = builder.sub(last, first)
        with emitter.loop(I64(0), builder.udiv(builder.add(run, I64(_SPAN - 1)), I64(_SPAN))) as span:
            begin = builder.add(first, builder.mul(span, I64(_SPAN)))
            end = emitter.least(builder.add(begin, I64(_SPAN)), last)
            for work in (self.scale, self.multiply):
                with emitter.loop(begin, end) as i:
                    pointer = emitter.move(start, builder.mul(i, I64(joined * size)))
                    if work == self.multiply:
                        self.prefetch(pointer, joined * size)
                    position = builder.mul(i, I64(joined * weights))
                    work(self._decode(pointer, joined), position, builder.sub(i, begin))

    def block(self, decoded: Decoded, position: ir.Value) -> None:
        self.scale(decoded, position, I64(0))
        self.multiply(decoded, position, I64(0))

    def scale(self, decoded: Decoded, position: ir.Value, index: ir.Value) -> None:
        """Leaves the factors of a run's groups where `multiply` finds them, and subtracts their minimums."""
        quants, scales, minimums, zero = without_zero(decoded) if self.itemsize == 4 else decoded
        self.groups = len(quants)
        if zero:
            minimums = scales * float(zero)
        for token, start in enumerate(self.starts):
            place = self.builder.add(start, position)
            if scales is not None:
                self.emitter.store(self._factors(scales, place), self._factor(token, index))
            if minimums is not None:
                self._subtract_minimums(token, minimums, place)
        self.halves = 0 if scales is None else max(scales.count // self.groups, 1)

    def multiply(self, decoded: Decoded, position: ir.Value, index: ir.Value) -> None:
        """Adds the products of a run's quants, times their factors."""
        quants = (without_zero(decoded) if self.itemsize == 4 else decoded).quants
        for group, quant in enumerate(quants):
            for token, start in enumerate(self.starts):
                x = self.emitter.at(self.job["x"], self.builder.add(start, position), self.itemsize)
                x = self.emitter.move(x, GROUP * group * self.itemsize)
                factors = self.emitter.move(self._factor(token, index), 4 * self.halves * group)
                self.meet(token, group, quant, x, factors)

    def _factor(self, token: int, index: ir.Value) -> ir.Value:
        """Where the factors of a span's run are."""
        number = self.builder.add(index, I64(token * _SPAN))
        return self.emitter.move(self.factors, self.builder.mul(number, I64(4 * _MOST_FACTORS)))

    def _add(self, token: int, chain: int, a: Vector, b: Vector) -> None:
        place = self.sums[token][chain % len(self.sums[token])]
        total = self.emitter.multiply_add(a, b, Vector(self.emitter, self.builder.load(place)))
        self.builder.store(total.value, place)

    def _factors(self, scales: Vector, place: ir.Value) -> Vector:
        """The scales of weights, times those of activations, for each group or each half of one."""
        count = max(scales.count, self.groups)
        scales = scales.lanes([i * scales.count // count for i in range(count)])
        if self.itemsize == 4:
            return scales
        group = self.builder.lshr(place, I64(5))
        of_x = self.emitter.load(self.emitter.at(self.job["x_scales"], group, 4), F32, self.groups)
        return scales * of_x.lanes([i * self.groups // count for i in range(count)])

    def _subtract_minimums(self, token: int, minimums: Vector, place: ir.Value) -> None:
        halves = minimums.count > self.groups
        index = self.builder.lshr(place, I64(4 if halves else 5))
        base = self.job["x_half_sums" if halves else "x_sums"]
        sums = self.emitter.load(self.emitter.at(base, index, 4), F32, (1 + halves) * self.groups)
        minimums = minimums.lanes([i * minimums.count // sums.count for i in range(sums.count)]) * -1.0
        lanes = self.lanes
        for i in range(0, sums.count, lanes):
            parts = (v.lanes(range(i, i + lanes)) if v.count >= lanes else self._padded(v) for v in (minimums, sums))
            self._add(token, i // lanes, *parts)

    def _padded(self, vector: Vector) -> Vector:
        return vector.lanes(
            [*range(vector.count), *[vector.count] * (self.lanes - vector.count)],
            self.emitter.number(0.0, vector.count),
        )

    def _read(self, factors: ir.Value, half: int | None = None) -> Vector:
        """The factors of a group's sums, lane by lane; those of one half alone for all lanes."""
        if half is not None:
            return self.emitter.load(self.emitter.move(factors, 4 * half), F32).widen(self.lanes)
        half = self.lanes // 2
        return self.emitter.load(factors, F32, self.halves).lanes([0] * half + [self.halves - 1] * half)

    def _meet_words(self, token: int, group: int, quant: Vector, x: ir.Value, factors: ir.Value) -> None:
        emitter = self.emitter
        parts = words(quant)
        activations = (emitter.load(emitter.move(x, 32 * i), I16, parts[0].count) for i in range(len(parts)))
        sums = functools.reduce(Vector.__add__, map(emitter.multiply_pairs, parts, activations))
        self._add(token, group, sums.float(), self._read(factors))

    def _meet_bytes(self, token: int, group: int, quant: Vector, x: ir.Value, factors: ir.Value) -> None:
        sums = self.emitter.multiply_bytes(quant, self.emitter.load(x, I8, 32, signed=True))
        self._add(token, group, sums.float(), self._read(factors))

    def _meet_floats(self, token: int, group: int, quant: Vector, x: ir.Value, factors: ir.Value) -> None:
        emitter = self.emitter
        weights = [quant.lanes(range(i, i + 8)).float() for i in (0, 8, 16, 24)]
        activations = [emitter.load(emitter.move(x, 32 * i), F32, 8) for i in range(4)]
        if not self.halves:
            for i in range(4):
                self._add(token, 4 * group + i, weights[i], activations[i])
            return
        for half in range(self.halves):
            total = emitter.number(0.0, 8)
            for i in range(4 * half // self.halves, 4 * (half + 1) // self.halves):
                total = emitter.multiply_add(weights[i], activations[i], total)
            self._add(token, group, total, self._read(factors, half))
