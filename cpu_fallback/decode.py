"""How each format's blocks become numbers: one decode function a format, written once for NumPy and for LLVM.

A decode function gets a block and speaks to it in short vectors: loads (`block.u8(offset, count)`), bit operations and
arithmetic on the result, and a few functions of the block (`float`, `concat`, `interleave`). In `dequantize`
a vector is a NumPy array of `count` columns with one row for every block at once; in `vectors` it is an LLVM vector of
`count` lanes, and the same function emits machine code that stays in registers. A vector of one element stretches to
its partner's count. Bytes wrap around as uint8 does.

Layouts follow ggml's `block_*` structures (ggml-common.h). A weight is scale * (quant - zero) - minimum, rounded in
this order. Formats have either a zero or minimums: a zero is left to the caller, because sums of products need not
subtract it from every quant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from trichord.weight_format import WeightFormat

GROUP = 32
"""Weights of one quant vector. Every block holds a whole number of such groups."""

Vector = Any  # a NumPy array or `vectors.Vector`; both overload & | ^ << >> + - *
Block = Any  # `dequantize.NumpyBlock` or `vectors.LlvmBlock`


class Decoded(NamedTuple):
    """One block's weights. Scales and minimums are spread evenly: one for each 16, 32 or more weights in turn."""

    quants: list[Vector]
    """Vectors of 32: bytes, signed or not (then below 128), or the weights themselves as float32."""
    scales: Vector | None = None
    """float32; None where the quants are the weights."""
    minimums: Vector | None = None
    """float32, subtracted after scaling; as many as scales."""
    zero: int = 0
    """The quant that means 0; quants that have one are unsigned."""


def _f32(block: Block) -> Decoded:
    return Decoded([block.f32(0, GROUP)])


def _f16(block: Block) -> Decoded:
    return Decoded([block.f16(0, GROUP)])


def _bf16(block: Block) -> Decoded:
    return Decoded([block.bf16(0, GROUP)])


def _q1_0(block: Block) -> Decoded:
    quants = []
    for group in range(4):
        bits = block.u8(2 + 4 * group, 4)
        quants.append(block.interleave(*(((bits >> i) & 1) << 1 for i in range(8))))
    return Decoded(quants, block.f16(0), zero=1)


def _q2_0(block: Block) -> Decoded:
    quants = []
    for group in range(2):
        pairs = block.u8(2 + 8 * group, 8)
        quants.append(block.interleave(*((pairs >> i) & 3 for i in (0, 2, 4, 6))))
    return Decoded(quants, block.f16(0), zero=1)


def _q4_0(block: Block) -> Decoded:
    q = block.u8(2, 16)
    return Decoded([block.concat(q & 15, q >> 4)], block.f16(0), zero=8)


def _q8_0(block: Block) -> Decoded:
    return Decoded([block.i8(2, 32)], block.f16(0))


def _q8_1(block: Block) -> Decoded:
    return Decoded([block.i8(4, 32)], block.f16(0))  # the half at byte 2 is the sum, for products only


def _k_scales(block: Block) -> tuple[Vector, Vector]:
    """Eight scales and eight minimums of 6 bits in the 12 bytes from byte 4 (Q4_K, Q5_K), times their halves."""
    low, high, mixed = block.u8(4, 4), block.u8(8, 4), block.u8(12, 4)
    scales = block.concat(low & 63, (mixed & 15) | ((low >> 6) << 4))
    minimums = block.concat(high & 63, (mixed >> 4) | ((high >> 6) << 4))
    return block.f16(0) * block.float(scales), block.f16(2) * block.float(minimums)


def _q4_k(block: Block) -> Decoded:
    quants = []
    for i in range(4):
        q = block.u8(16 + 32 * i, 32)
        quants += [q & 15, q >> 4]
    return Decoded(quants, *_k_scales(block))


def _q5_k(block: Block) -> Decoded:
    fifth, quants = block.u8(16, 32), []
    for i in range(4):
        q = block.u8(48 + 32 * i, 32)
        quants += [(q & 15) | (((fifth >> (2 * i)) & 1) << 4), (q >> 4) | (((fifth >> (2 * i + 1)) & 1) << 4)]
    return Decoded(quants, *_k_scales(block))


def _q6_k(block: Block) -> Decoded:
    quants = []
    for half in range(2):
        low, high = [block.u8(64 * half + i, 32) for i in (0, 32)], block.u8(128 + 32 * half, 32)
        for i in range(4):
            nibble = low[i % 2] & 15 if i < 2 else low[i % 2] >> 4
            quants.append(nibble | (((high >> (2 * i)) & 3) << 4))
    return Decoded(quants, block.f16(208) * block.float(block.i8(192, 16)), zero=32)


def _q8_k(block: Block) -> Decoded:
    return Decoded([block.i8(4 + 32 * i, 32) for i in range(8)], block.f32(0))


DECODERS: dict[WeightFormat, Callable[[Block], Decoded]] = {
    WeightFormat.F32: _f32,
    WeightFormat.F16: _f16,
    WeightFormat.BF16: _bf16,
    WeightFormat.Q1_0: _q1_0,
    WeightFormat.Q2_0: _q2_0,
    WeightFormat.Q4_0: _q4_0,
    WeightFormat.Q8_0: _q8_0,
    WeightFormat.Q8_1: _q8_1,
    WeightFormat.Q4_K: _q4_k,
    WeightFormat.Q5_K: _q5_k,
    WeightFormat.Q6_K: _q6_k,
    WeightFormat.Q8_K: _q8_k,
}
"""The formats multiplied in place. One function above and one row here make a new one, in NumPy and in LLVM."""


def chunk(format: WeightFormat) -> tuple[int, int]:
    """(weights, bytes) that one call of the decoder covers: a block, or 32 weights of a format without blocks."""
    count = max(1, GROUP // format.block_size)
    return count * format.block_size, count * format.block_bytes
