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

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

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


def _f64(block: Block) -> Decoded:
    return Decoded([block.f64(0, GROUP)])


def _q1_0(block: Block) -> Decoded:
    return Decoded([block.masks(block.u8(2 + 4 * i, 4)) & 2 for i in range(4)], block.f16(0), zero=1)


def _q2_0(block: Block) -> Decoded:
    quants = []
    for group in range(2):
        pairs = block.u8(2 + 8 * group, 8)
        quants.append(block.interleave(*((pairs >> i) & 3 for i in (0, 2, 4, 6))))
    return Decoded(quants, block.f16(0), zero=1)


def _nibbles(block: Block, offset: int) -> Vector:
    """Codes of 4 bits in 16 bytes: the low ones first."""
    q = block.u8(offset, 16)
    return block.concat(q & 15, q >> 4)


def _q4_0(block: Block) -> Decoded:
    return Decoded([_nibbles(block, 2)], block.f16(0), zero=8)


def _q4_1(block: Block) -> Decoded:
    return Decoded([_nibbles(block, 4)], block.f16(0), -block.f16(2))


def _q5_0(block: Block) -> Decoded:
    fifth = block.masks(block.u8(2, 4)) & 16
    return Decoded([_nibbles(block, 6) | fifth], block.f16(0), zero=16)


def _q5_1(block: Block) -> Decoded:
    fifth = block.masks(block.u8(4, 4)) & 16
    return Decoded([_nibbles(block, 8) | fifth], block.f16(0), -block.f16(2))


def _q8_0(block: Block) -> Decoded:
    return Decoded([block.i8(2, 32)], block.f16(0))


def _q8_1(block: Block) -> Decoded:
    return Decoded([block.i8(4, 32)], block.f16(0))  # the half at byte 2 is the sum, for products only


def _pairs(block: Block, offset: int) -> list[Vector]:
    """Codes of 2 bits in 64 bytes: four groups in each 32."""
    halves = block.u8(offset, 32), block.u8(offset + 32, 32)
    return [(q >> i) & 3 for q in halves for i in (0, 2, 4, 6)]


def _q2_k(block: Block) -> Decoded:
    fields = block.u8(0, 16)
    scales, minimums = block.float(fields & 15), block.float(fields >> 4)
    return Decoded(_pairs(block, 16), block.f16(80) * scales, block.f16(82) * minimums)


def _q3_k(block: Block) -> Decoded:
    third = block.u8(0, 32)
    quants = [low | (((third >> i) & 1) << 2) for i, low in enumerate(_pairs(block, 32))]
    low, high = block.u8(96, 8), block.u8(104, 4)
    high = block.concat(*((high >> i) & 3 for i in (0, 2, 4, 6)))
    scales = block.concat(low & 15, low >> 4) | (high << 4)
    return Decoded(quants, block.f16(108) * (block.float(scales) - 32.0), zero=4)


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


def _tq1_0(block: Block) -> Decoded:
    """Five digits of base 3 in a byte q, as a fraction: digit n is the integer part of 3 * (q * 3**n mod 256) / 256."""

    def digits(q: Vector, count: int) -> list[Vector]:
        powers = [q]
        while len(powers) < count:
            powers.append(powers[-1] + powers[-1] + powers[-1])
        # 3 * q / 4 rounded down is q / 2 and q / 4, each rounded down, and a carry from their lost bits.
        return [((q >> 1) + (q >> 2) + (q & (q >> 1) & 1)) >> 6 for q in powers]

    a, b, c, d, e = digits(block.u8(32, 16), 5)
    last = block.concat(*digits(block.u8(48, 4), 4))
    rest = [block.concat(a, b), block.concat(c, d), block.concat(e, last)]
    return Decoded(digits(block.u8(0, 32), 5) + rest, block.f16(52), zero=1)


def _tq2_0(block: Block) -> Decoded:
    return Decoded(_pairs(block, 0), block.f16(64), zero=1)


@functools.cache
def _table(name: str) -> np.ndarray:
    """A codebook of the gguf package, imported when one is needed: 16 bytes, floats, or rows of 8 or 4 bytes."""
    from gguf import quants

    if name == "E8M0":
        return quants.MXFP4.e8m0_to_fp32_half(np.arange(256))
    if name == "UE4M3":
        return quants.NVFP4.ue4m3_to_fp32(np.arange(256)).astype(np.float32)
    quant = getattr(quants, name)
    if hasattr(quant, "kvalues"):
        return np.array(quant.kvalues, np.int8).view(np.uint8)
    quant.init_grid()
    grid = quant.grid.reshape(quant.grid_shape)
    if name == "IQ1_S":  # 8 * (entry + delta) + 9, first where delta is 1/8, then where it is -1/8
        grid = np.concatenate([8 * grid + 10, 8 * grid + 8])
    return grid.astype(np.uint8)


def _from_table(block: Block, name: str, codes: Vector) -> Vector:
    return block.signed(block.look_up(_table(name), codes))


def _iq4_nl(block: Block) -> Decoded:
    return Decoded([_from_table(block, "IQ4_NL", _nibbles(block, 2))], block.f16(0))


def _iq4_xs(block: Block) -> Decoded:
    quants = [_from_table(block, "IQ4_NL", _nibbles(block, 8 + 16 * i)) for i in range(8)]
    low, high = block.u8(4, 4), block.u8(2, 2)
    low = block.interleave(low & 15, low >> 4)
    high = block.interleave(*((high >> i) & 3 for i in (0, 2, 4, 6)))
    return Decoded(quants, block.f16(0) * (block.float(low | (high << 4)) - 32.0))


def _mxfp4(block: Block) -> Decoded:
    scale = block.look_up(_table("E8M0"), block.u8(0))
    return Decoded([_from_table(block, "MXFP4", _nibbles(block, 1))], scale)


def _nvfp4(block: Block) -> Decoded:
    quants = []
    for group in range(2):
        first, second = block.u8(4 + 16 * group, 8), block.u8(12 + 16 * group, 8)
        codes = block.concat(first & 15, first >> 4, second & 15, second >> 4)
        quants.append(_from_table(block, "MXFP4", codes))
    return Decoded(quants, block.look_up(_table("UE4M3"), block.u8(0, 4)))


def _signed_grid(block: Block, name: str, indices: Vector, signs: Vector) -> Vector:
    """Entries of a grid, negated where the byte of `signs` is 255 and not 0."""
    return block.signed((block.look_up(_table(name), indices) ^ signs) - signs)


def _even_signs(block: Block, sevens: Vector) -> list[Vector]:
    """Groups of signs, of each byte's 7 and an eighth that makes their number even."""
    odd = sevens ^ (sevens >> 4)
    odd = odd ^ (odd >> 2)
    odd = odd ^ (odd >> 1)
    signs = sevens | (odd << 7)
    return [block.masks(block.part(signs, 4 * i, 4)) for i in range(8)]


def _sevens(block: Block, words: list[Vector]) -> Vector:
    """The four times 7 bits of each word, as bytes."""
    together = block.concat(*words)
    return block.narrow(block.interleave(*((together >> i) & 127 for i in (0, 7, 14, 21))))


def _nibble_scales(block: Block, offset: int, count: int) -> Vector:
    fields = block.u8(offset, count)
    return block.float(block.interleave(fields & 15, fields >> 4))


def _iq2_xxs(block: Block) -> Decoded:
    words = [block.u32(6 + 8 * i) for i in range(8)]
    signs = _even_signs(block, _sevens(block, words))
    quants = [_signed_grid(block, "IQ2_XXS", block.u8(2 + 8 * i, 4), signs[i]) for i in range(8)]
    return Decoded(quants, block.f16(0) * (block.float(block.concat(*words) >> 28) + 0.5) * 0.25)


def _iq2_xs(block: Block) -> Decoded:
    signs = _even_signs(block, block.narrow(block.u16(2, 32) >> 9))
    quants = [_signed_grid(block, "IQ2_XS", block.u16(2 + 8 * i, 4) & 511, signs[i]) for i in range(8)]
    return Decoded(quants, block.f16(0) * (_nibble_scales(block, 66, 8) + 0.5) * 0.25)


def _iq2_s(block: Block) -> Decoded:
    quants = []
    for i in range(8):
        high = block.u8(66 + i)
        high = block.concat(*((high >> j) & 3 for j in (0, 2, 4, 6)))
        indices = block.wide(block.u8(2 + 4 * i, 4)) | (block.wide(high) << 8)
        quants.append(_signed_grid(block, "IQ2_S", indices, block.masks(block.u8(34 + 4 * i, 4))))
    return Decoded(quants, block.f16(0) * (_nibble_scales(block, 74, 8) + 0.5) * 0.25)


def _iq3_xxs(block: Block) -> Decoded:
    words = [block.u32(66 + 4 * i) for i in range(8)]
    signs = _even_signs(block, _sevens(block, words))
    quants = [_signed_grid(block, "IQ3_XXS", block.u8(2 + 8 * i, 8), signs[i]) for i in range(8)]
    return Decoded(quants, block.f16(0) * (block.float(block.concat(*words) >> 28) + 0.5) * 0.5)


def _iq3_s(block: Block) -> Decoded:
    quants = []
    for i in range(8):
        high = block.masks(block.u8(66 + i)) & 1
        indices = block.wide(block.u8(2 + 8 * i, 8)) | (block.wide(high) << 8)
        quants.append(_signed_grid(block, "IQ3_S", indices, block.masks(block.u8(74 + 4 * i, 4))))
    return Decoded(quants, block.f16(0) * (_nibble_scales(block, 106, 4) * 2.0 + 1.0))


def _iq1_s(block: Block) -> Decoded:
    quants = []
    for i in range(8):
        fields = block.u16(34 + 2 * i)
        high = block.concat(*(((fields >> j) & 7) << 8 for j in (0, 3, 6, 9)))
        indices = block.wide(block.u8(2 + 4 * i, 4)) | high | ((fields >> 15) << 11)
        quants.append(block.look_up(_table("IQ1_S"), indices))
    scales = block.float((block.u16(34, 8) >> 12) & 7) * 2.0 + 1.0
    return Decoded(quants, block.f16(0) * scales * 0.125, zero=9)


def _iq1_m(block: Block) -> Decoded:
    quants = []
    for i in range(8):
        high = block.u8(32 + 2 * i, 2)
        high = block.interleave(high & 15, high >> 4)
        quants.append(block.look_up(_table("IQ1_S"), block.wide(block.u8(4 * i, 4)) | (block.wide(high) << 8)))
    a, b, c, d = (block.u16(48 + 2 * i) for i in range(4))
    scale = block.half((a >> 12) | ((b >> 12) << 4) | ((c >> 12) << 8) | ((d >> 12) << 12))
    fields = block.u16(48, 4)
    scales = block.interleave(*((fields >> i) & 7 for i in (0, 3, 6, 9)))
    return Decoded(quants, scale * (block.float(scales) * 2.0 + 1.0) * 0.125, zero=9)


DECODERS: dict[WeightFormat, Callable[[Block], Decoded]] = {
    WeightFormat.F32: _f32,
    WeightFormat.F16: _f16,
    WeightFormat.BF16: _bf16,
    WeightFormat.F64: _f64,
    WeightFormat.Q1_0: _q1_0,
    WeightFormat.Q2_0: _q2_0,
    WeightFormat.Q4_0: _q4_0,
    WeightFormat.Q4_1: _q4_1,
    WeightFormat.Q5_0: _q5_0,
    WeightFormat.Q5_1: _q5_1,
    WeightFormat.Q8_0: _q8_0,
    WeightFormat.Q8_1: _q8_1,
    WeightFormat.Q2_K: _q2_k,
    WeightFormat.Q3_K: _q3_k,
    WeightFormat.Q4_K: _q4_k,
    WeightFormat.Q5_K: _q5_k,
    WeightFormat.Q6_K: _q6_k,
    WeightFormat.Q8_K: _q8_k,
    WeightFormat.IQ1_S: _iq1_s,
    WeightFormat.IQ1_M: _iq1_m,
    WeightFormat.IQ2_XXS: _iq2_xxs,
    WeightFormat.IQ2_XS: _iq2_xs,
    WeightFormat.IQ2_S: _iq2_s,
    WeightFormat.IQ3_XXS: _iq3_xxs,
    WeightFormat.IQ3_S: _iq3_s,
    WeightFormat.IQ4_NL: _iq4_nl,
    WeightFormat.IQ4_XS: _iq4_xs,
    WeightFormat.MXFP4: _mxfp4,
    WeightFormat.NVFP4: _nvfp4,
    WeightFormat.TQ1_0: _tq1_0,
    WeightFormat.TQ2_0: _tq2_0,
}
"""The formats multiplied in place. One function above and one row here make a new one, in NumPy and in LLVM."""


def chunk(format: WeightFormat) -> tuple[int, int]:
    """(weights, bytes) that one call of the decoder covers: a block, or 32 weights of a format without blocks."""
    count = max(1, GROUP // format.block_size)
    return count * format.block_size, count * format.block_bytes
