"""Weights as floats: every kernel but the integer dot product reads them through `decode_tile`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _code_floats(words, zero):
    """(R, G, 2, 4) words of signed bytes -> (R, G, 2, 4, 2, 2) float16 byte - zero: byte index = 2 * last + other.

    Integer-to-float conversions run at a quarter of the rate of logic. So the byte goes into the mantissa of 1024:
    with its sign bit flipped it is byte + 128, and as float16 bits 0x6400 | n is 1024 + n, exactly. Two bytes of a
    word become two float16 at a time.
    """
    pairs = tl.join((words & 0x00FF00FF) ^ 0x64806480, ((words >> 8) & 0x00FF00FF) ^ 0x64806480)
    halves = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    return halves.to(tl.float16, bitcast=True) - (1024.0 + 128.0 + zero)


@triton.jit
def decode_tile(planes, row, group, columns, FORMAT: tl.constexpr):
    """Weights of rows (R,) int64 and groups (G,) int32 -> (R, G, group_size) float32."""
    if FORMAT.integer:
        SHAPE: tl.constexpr = (row.shape[0], group.shape[0], 32 // FORMAT.scale_group, FORMAT.scale_group)
        low, high, scale, minimum = FORMAT.decode(planes, row, group, columns)
        codes = _code_floats(tl.permute(tl.join(low, high), (0, 1, 3, 2)), FORMAT.zero)
        codes = tl.permute(codes, (0, 1, 2, 3, 5, 4))
        weights = tl.reshape(codes.to(tl.float32), SHAPE) * scale[:, :, :, None]
        if FORMAT.has_minimum:
            weights -= minimum[:, :, :, None]
        return tl.reshape(weights, (row.shape[0], group.shape[0], 32))
    else:
        return FORMAT.decode(planes, row, group, columns)


@triton.jit
def fragment_order(tile):
    """(R, C) -> (R, C) with each 16 columns in the order in which the activations of `half_kernel` come.

    A thread of a tensor core holds columns 2t, 2t+1, 2t+8 and 2t+9 of 16. In this order these are the four bytes of
    one word of codes, so a word can be decoded where it is multiplied and nothing passes through shared memory.
    The sum over columns does not mind.
    """
    split = tl.reshape(tile, (tile.shape[0], tile.shape[1] // 16, 4, 2, 2))
    return tl.reshape(tl.permute(split, (0, 1, 4, 2, 3)), tile.shape)
