"""The 8-bit key-value cache: int8 numbers, and a float16 scale for each 32 elements of a head's row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _grouped(x):
    """A tile (rows, columns) as (rows, groups, columns of a group)."""
    WIDTH: tl.constexpr = min(32, x.shape[1])
    return tl.reshape(x, [x.shape[0], x.shape[1] // WIDTH, WIDTH])


@triton.jit
def store_8bit(x, cache, scales, rows, used, SIZE: tl.constexpr):
    """float32 (R, columns), zero beyond SIZE, to rows (R, 1) of a cache and of its scales, where they are `used`.

    The scale of a group is its largest magnitude over 127; one of zeros gets 0, one with a NaN gets NaN.
    """
    GROUPS: tl.constexpr = (SIZE + 31) // 32
    groups = _grouped(x)
    bits = groups.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # in the order of magnitudes, NaN above all
    largest = tl.max(bits, axis=2).to(tl.float32, bitcast=True)
    scale = (largest / 127.0).to(tl.float16)
    stored = scale.to(tl.float32)
    inverse = tl.where(stored > 0, 1.0 / tl.maximum(stored, 1e-30), 0.0)
    # Adding 1.5 * 2^23 rounds to an integer, ties to even. A rounded scale may be too small, and NaN is no integer.
    numbers = (groups * inverse[:, :, None] + 12582912.0) - 12582912.0
    numbers = tl.minimum(tl.maximum(numbers, -127.0), 127.0)
    columns = tl.arange(0, x.shape[1])[None, :]
    tl.store(cache + rows * SIZE + columns, tl.reshape(numbers, x.shape).to(tl.int8), mask=used & (columns < SIZE))
    columns = tl.arange(0, scale.shape[1])[None, :]
    tl.store(scales + rows * GROUPS + columns, scale, mask=used & (columns < GROUPS))


@triton.jit
def dequantized(tile, scales, inside, FIRST, COUNT, EXACT: tl.constexpr, MASKED: tl.constexpr):
    """An int8 tile (rows, columns) times its scales, float32 when EXACT, else float16; without scales, as it is.

    scales point to those of each row, of which COUNT elements from FIRST on, a multiple of 32, are in the tile. When
    MASKED, rows that are not `inside` are not read.
    """
    if scales is None:
        return tile
    else:
        groups = _grouped(tile.to(tl.float32 if EXACT else tl.float16))
        offsets = tl.arange(0, groups.shape[1])
        mask = (offsets < (COUNT + 31) // 32)[None, :]
        if MASKED:
            mask &= inside[:, None]
        factors = tl.load(scales[:, None] + (FIRST // 32 + offsets)[None, :], mask=mask, other=0.0)
        return tl.reshape(groups * factors[:, :, None].to(groups.dtype), tile.shape)
