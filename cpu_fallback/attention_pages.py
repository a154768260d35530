"""Pages of the key-value cache on their way to attention: to float32, the keys transposed, in Numba."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from trichord.cpu_fallback.jit import compiled
from trichord.cpu_fallback.native import emitter_for, fetch, floats, from_half, halves, signed_bytes
from trichord.cpu_fallback.vectors import F32, I8, I16, I64, Vector

GROUP = 32
"""Elements of a row that share a scale in a cache of 8 bits."""


def _transposed(rows: list[Vector]) -> list[Vector]:
    """8 vectors of 8 lanes -> the vectors of their first lanes, second lanes, and so on, in three rounds of swaps."""
    for distance in (1, 2, 4):
        first = [lane if not lane & distance else lane + 8 - distance for lane in range(8)]
        second = [lane + distance if not lane & distance else lane + 8 for lane in range(8)]
        swapped = list(rows)
        for low in (row for row in range(8) if not row & distance):
            high = low + distance
            swapped[low], swapped[high] = rows[low].lanes(first, rows[high]), rows[low].lanes(second, rows[high])
        rows = swapped
    return rows


def _transpose_block(element: ir.Type):  # type: ignore[no-untyped-def]
    @intrinsic
    def transpose(typing_context, target, target_stride, source, source_stride, scales, scales_stride):  # type: ignore[no-untyped-def]
        """8 x 8 numbers at `source` as float32, transposed, to `target`; addresses, strides in bytes.

        Bytes are multiplied by the scale of their row; of the others, the last two arguments say nothing.
        """

        def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            emitter = emitter_for(context, builder)
            target, target_stride, source, source_stride, scales, scales_stride = arguments
            target, source, scales = (builder.inttoptr(a, I8.as_pointer()) for a in (target, source, scales))

            def load(pointer: ir.Value, stride: ir.Value, element: ir.Type, count: int) -> list[Vector]:
                places = (emitter.move(pointer, builder.mul(stride, I64(row))) for row in range(8))
                return [emitter.load(place, element, count, signed=element == I8) for place in places]

            rows = load(source, source_stride, element, 8)
            if element == I16:
                rows = [emitter.from_half(row) for row in rows]
            elif element == I8:
                factors = load(scales, scales_stride, I16, 1)
                rows = [row.float() * emitter.from_half(factor) for row, factor in zip(rows, factors, strict=True)]
            for column, vector in enumerate(_transposed(rows)):
                emitter.store(vector, emitter.move(target, builder.mul(target_stride, I64(column))))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), emit

    return transpose


_transpose_bytes, _transpose_halves, _transpose_floats = map(_transpose_block, (I8, I16, F32))


@intrinsic
def _scale_bytes(typing_context, target, source, scale):  # type: ignore[no-untyped-def]
    """8 int8 numbers times a float16 scale, to float32; all by their addresses."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        emitter = emitter_for(context, builder)
        target, source, scale = (builder.inttoptr(a, I8.as_pointer()) for a in arguments)
        numbers, factor = emitter.load(source, I8, 8, signed=True), emitter.from_half(emitter.load(scale, I16))
        emitter.store(numbers.float() * factor, target)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), emit


@compiled
def load_keys(target, address, scales, itemsize, count, ahead):  # type: ignore[no-untyped-def]
    """The first `count` keys of a page, transposed, to target (size, page); a few further ones may come along.

    Numbers of one byte come with the address of the first key's scales. Meanwhile as much is fetched from `ahead` on, a
    little with each block: the CPU cannot wait for a whole page at once.
    """
    size = len(target)
    row_scales = (size + GROUP - 1) // GROUP * 2
    for column in range(0, size - 7, 8):
        for row in range(0, count, 8):
            fetch(ahead, 64 * itemsize)
            ahead += 64 * itemsize
            place = target.ctypes.data + column * target.strides[0] + row * 4
            source = address + (row * size + column) * itemsize
            if itemsize == 1:
                factors = scales + row * row_scales + column // GROUP * 2
                _transpose_bytes(place, target.strides[0], source, size, factors, row_scales)
            elif itemsize == 2:
                _transpose_halves(place, target.strides[0], source, size * 2, 0, 0)
            else:
                _transpose_floats(place, target.strides[0], source, size * 4, 0, 0)
    for column in range(size // 8 * 8, size):
        for row in range(count):
            if itemsize == 1:
                factor = from_half(halves(scales + row * row_scales, size)[column // GROUP])
                number = signed_bytes(address + row * size * itemsize, size)[column]
                target[column, row] = np.float32(number) * factor
            elif itemsize == 2:
                target[column, row] = from_half(halves(address + row * size * itemsize, size)[column])
            else:
                target[column, row] = floats(address + row * size * itemsize, size)[column]


@compiled
def load_values(target, address, scales, itemsize, size, stride, count, ahead):  # type: ignore[no-untyped-def]
    """The first `count` values (size), `stride` numbers apart, to target (count, size or more); see `load_keys`."""
    for row in range(count):
        fetch(ahead + row * stride * itemsize, size * itemsize)
        if itemsize == 1:
            _load_bytes(target[row], address + row * stride, scales + row * ((size + GROUP - 1) // GROUP) * 2, size)
        elif itemsize == 2:
            source = halves(address + row * stride * 2, size)
            for column in range(size):
                target[row, column] = from_half(source[column])
        else:
            numbers = floats(address + row * stride * 4, size)
            for column in range(size):
                target[row, column] = numbers[column]


@compiled
def _load_bytes(target, address, scales, size):  # type: ignore[no-untyped-def]
    """A row of a cache of 8 bits."""
    for column in range(0, size - 7, 8):
        _scale_bytes(target.ctypes.data + 4 * column, address + column, scales + column // GROUP * 2)
    for column in range(size // 8 * 8, size):
        factor = from_half(halves(scales, size)[column // GROUP])
        target[column] = np.float32(signed_bytes(address, size)[column]) * factor
