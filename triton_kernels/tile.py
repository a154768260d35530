"""Weights as floats: every kernel but the integer dot product reads them through `decode_tile`."""

from __future__ import annotations

import triton
import triton.language as tl

from trichord.triton_kernels.primitives import in_register, pack_halves, scaled_halves, unpack_halves


@triton.jit
def _as_mantissas(words, bits):
    """(R, G, 2, 4) words of signed bytes -> (R, G, 2, 4, 2) words of two float16; half d of word c is byte 2d + c.

    Integer-to-float conversions run at a quarter of the rate of logic. So a byte goes into a mantissa: with its sign
    bit flipped it is byte + 128, and as float16 bits 0x6400 | n is 1024 + n, exactly. `bits` are 0x6480, or those of a
    smaller exponent, twice.
    """
    return tl.join((words & 0x00FF00FF) ^ bits, ((words >> 8) & 0x00FF00FF) ^ bits)


@triton.jit
def _integer_tile(planes, row, group, columns, FORMAT: tl.constexpr, HALF: tl.constexpr):
    """`decode_tile` for an integer format."""
    # In float16 the codes are eighths, and the scale is that of a whole eight. So the scales of all formats that keep
    # them in half precision are multiples of the smallest float16: they lose their last bits, but are never lost.
    SHIFT: tl.constexpr = 3 if HALF else 0
    BIAS: tl.constexpr = 0x6480 - (SHIFT << 10)
    # Counted from the middle, codes leave a minimum so small that rounding it does no harm.
    MIDDLE: tl.constexpr = 1 << (FORMAT.code_bits - 1) if HALF and FORMAT.has_minimum else 0
    HALVES: tl.constexpr = (row.shape[0], group.shape[0], 2, 4, 2, 2)
    SCALED: tl.constexpr = (row.shape[0], group.shape[0], 32 // FORMAT.scale_group, FORMAT.scale_group // 2)
    low, high, scale, minimum = FORMAT.decode(planes, row, group, columns)
    # In float32 a constant more in a register is dearer than the instructions that copy it.
    bits = in_register(BIAS * 0x10001, row.to(tl.int32)[:, None, None, None]) if HALF else BIAS * 0x10001
    codes = tl.reshape(_as_mantissas(tl.permute(tl.join(low, high), (0, 1, 3, 2)), bits), SCALED)
    zero = tl.full((1, 1, 1, 1), (BIAS + FORMAT.zero + MIDDLE) * 0x10001, tl.int32)
    if HALF:
        of_eight = scale * 8.0
        factors = pack_halves(of_eight, minimum - scale * MIDDLE if FORMAT.has_minimum else of_eight)
        weights = scaled_halves(codes, zero, factors[:, :, :, None], FORMAT.has_minimum)
    else:
        codes = (unpack_halves(codes) - unpack_halves(zero)).to(tl.float32)
        weights = codes * scale[:, :, :, None, None]
        if FORMAT.has_minimum:
            weights -= minimum[:, :, :, None, None]
    weights = tl.permute(tl.reshape(weights, HALVES), (0, 1, 2, 3, 5, 4))
    return tl.reshape(weights, (row.shape[0], group.shape[0], 32))


@triton.jit
def decode_tile(planes, row, group, columns, FORMAT: tl.constexpr, HALF: tl.constexpr):
    """Weights of rows (R,) int64 and groups (G,) int32 -> (R, G, group_size) float32, or float16 with HALF.

    In float16 an instruction works on two weights of an integer format: the scale is rounded to float16, then the
    weight, once. What is out of range becomes infinite: weights from 65520 on, and groups with a scale above 8188.
    """
    if FORMAT.integer:
        return _integer_tile(planes, row, group, columns, FORMAT, HALF)
    else:
        return FORMAT.decode(planes, row, group, columns).to(tl.float16 if HALF else tl.float32)


@triton.jit
def fragment_order(tile):
    """(R, C) -> (R, C) with each 16 columns in the order in which the activations of `half_kernel` come.

    A thread of a tensor core holds columns 2t, 2t+1, 2t+8 and 2t+9 of 16. In this order these are the four bytes of
    one word of codes, so a word can be decoded where it is multiplied and nothing passes through shared memory.
    The sum over columns does not mind.
    """
    split = tl.reshape(tile, (tile.shape[0], tile.shape[1] // 16, 4, 2, 2))
    return tl.reshape(tl.permute(split, (0, 1, 4, 2, 3)), tile.shape)
