"""How chosen codes and scales lie in the blocks of each format (the layouts are ggml's, `ggml-common.h`).

Every function takes one `Encoded` batch of blocks and returns its bytes, (blocks, block_bytes) uint8.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Encoded(NamedTuple):
    """Blocks after the search, before packing. Codes count from zero.

    codes: (blocks, codes a block) unsigned. scale_codes: (blocks, groups), which member of the codebook of scales.
    d: (blocks, 1), the super-scale. shift_codes and m: the same for shifts, of the formats that have them.
    negative: (blocks, block_size) bool, of the formats that store signs apart.
    """

    codes: np.ndarray
    scale_codes: np.ndarray
    d: np.ndarray
    shift_codes: np.ndarray | None = None
    m: np.ndarray | None = None
    negative: np.ndarray | None = None


def _block(*fields: np.ndarray) -> np.ndarray:
    """Fields, each (blocks, ...) of any dtype, one after the other as bytes."""
    return np.concatenate([np.ascontiguousarray(f).view(np.uint8).reshape(len(f), -1) for f in fields], axis=1)


def _merge(values: np.ndarray, bits: int, dtype: type = np.uint8, axis: int = -1) -> np.ndarray:
    """Integers of `bits` bits along `axis` put side by side into one `dtype`, the first in the lowest bits."""
    values = np.moveaxis(values.astype(dtype), axis, -1)
    shifts = np.arange(values.shape[-1]).astype(dtype) * dtype(bits)
    return np.bitwise_or.reduce(values << shifts, axis=-1)


def _runs(codes: np.ndarray, bits: int, run: int) -> np.ndarray:
    """The low `bits` of each code: `run` codes fill the lowest bits of `run` bytes, the next `run` the bits above."""
    low = codes & ((1 << bits) - 1)
    return _merge(low.reshape(len(codes), -1, 8 // bits, run), bits, axis=2)


def q1_0(e: Encoded) -> np.ndarray:
    return _block(e.d, _runs(e.codes, 1, 1))


def q2_0(e: Encoded) -> np.ndarray:
    return _block(e.d, _runs(e.codes, 2, 1))


def q4_0(e: Encoded) -> np.ndarray:
    return _block(e.d, _runs(e.codes, 4, 16))


def q4_1(e: Encoded) -> np.ndarray:
    return _block(e.d, e.m, _runs(e.codes, 4, 16))


def q5_0(e: Encoded) -> np.ndarray:
    return _block(e.d, _runs(e.codes >> 4, 1, 1), _runs(e.codes, 4, 16))


def q5_1(e: Encoded) -> np.ndarray:
    return _block(e.d, e.m, _runs(e.codes >> 4, 1, 1), _runs(e.codes, 4, 16))


def _signed_bytes(e: Encoded) -> np.ndarray:
    return (e.codes.astype(np.int16) - 127).astype(np.int8)


def q8_0(e: Encoded) -> np.ndarray:
    return _block(e.d, _signed_bytes(e))


def q8_k(e: Encoded) -> np.ndarray:
    """The block ends with the sum of the codes of each 16 weights, which ggml's dot products read."""
    q = _signed_bytes(e)
    return _block(e.d, q, q.reshape(len(q), 16, 16).sum(axis=2, dtype=np.int16))


def q2_k(e: Encoded) -> np.ndarray:
    return _block(_merge(np.stack([e.scale_codes, e.shift_codes], axis=-1), 4), _runs(e.codes, 2, 32), e.d, -e.m)


def q3_k(e: Encoded) -> np.ndarray:
    low = _runs(e.scale_codes, 4, 8)
    high = _runs(e.scale_codes >> 4, 2, 4)
    return _block(_runs(e.codes >> 2, 1, 32), _runs(e.codes, 2, 32), low, high, e.d)


def _six_bit_pairs(e: Encoded) -> np.ndarray:
    """The 12 bytes that hold eight 6-bit scale codes and eight shift codes.

    Bytes 0 to 3 and 4 to 7 hold the first four of each; bytes 8 to 11 the low nibbles of the last four, whose upper
    two bits fill the top of the first eight bytes.
    """
    first, last = (np.stack([a[:, k : k + 4] for a in (e.scale_codes, e.shift_codes)], axis=1) for k in (0, 4))
    top = first | (last >> 4) << 6
    return np.concatenate([top.reshape(len(top), 8), _merge(last & 15, 4, axis=1)], axis=1).astype(np.uint8)


def q4_k(e: Encoded) -> np.ndarray:
    return _block(e.d, -e.m, _six_bit_pairs(e), _runs(e.codes, 4, 32))


def q5_k(e: Encoded) -> np.ndarray:
    return _block(e.d, -e.m, _six_bit_pairs(e), _runs(e.codes >> 4, 1, 32), _runs(e.codes, 4, 32))


def q6_k(e: Encoded) -> np.ndarray:
    scales = (e.scale_codes - 128).astype(np.int8)
    return _block(_runs(e.codes, 4, 64), _runs(e.codes >> 4, 2, 32), scales, e.d)


def tq1_0(e: Encoded) -> np.ndarray:
    """Five ternary digits a byte, as the fixed-point fraction digits / 3^5, so that multiplying by 3 yields the next.

    Weight k of a run of 32 (then one of 16, then one of 4) gives digit k // run of byte k % run.
    """
    parts = []
    for start, stop, digits in ((0, 160, 5), (160, 240, 5), (240, 256, 4)):
        places = 3 ** np.arange(4, 4 - digits, -1)
        part = e.codes[:, start:stop].reshape(len(e.codes), digits, -1).astype(np.uint16)
        parts.append(np.einsum("bdr,d->br", part, places))
    number = np.concatenate(parts, axis=1)
    return _block((-(-number * 256 // 243)).astype(np.uint8), e.d)


def tq2_0(e: Encoded) -> np.ndarray:
    return _block(_runs(e.codes, 2, 32), e.d)


def iq4_nl(e: Encoded) -> np.ndarray:
    return _block(e.d, _runs(e.codes, 4, 16))


def iq4_xs(e: Encoded) -> np.ndarray:
    high = _merge(e.scale_codes >> 4, 2, np.uint16)
    return _block(e.d, high, _runs(e.scale_codes, 4, 1), _runs(e.codes, 4, 16))


# E2M1: a sign bit over the magnitudes 0 to 7; the search orders its codes by value, -7 to 7.
_E2M1_CODE = np.array([15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7], np.uint8)


def mxfp4(e: Encoded) -> np.ndarray:
    return _block(e.scale_codes.astype(np.uint8), _runs(_E2M1_CODE[e.codes], 4, 16))


def nvfp4(e: Encoded) -> np.ndarray:
    return _block(e.scale_codes.astype(np.uint8), _runs(_E2M1_CODE[e.codes], 4, 8))


def _signs(e: Encoded, bits: int) -> np.ndarray:
    """One bit a weight, in fields of 8 weights; with 7 bits the eighth follows from an even number of negatives."""
    return _merge(e.negative.reshape(len(e.negative), -1, 8)[:, :, :bits], 1)


def _signs_and_scale(e: Encoded) -> np.ndarray:
    """A 32-bit word for each 32 weights: four times 7 sign bits, then the 4-bit scale."""
    signs = _merge(_signs(e, 7).reshape(len(e.codes), -1, 4), 7, np.uint32)
    return signs | e.scale_codes.astype(np.uint32) << np.uint32(28)


def iq2_xxs(e: Encoded) -> np.ndarray:
    grid = _merge(e.codes.reshape(len(e.codes), -1, 4), 8, np.uint32)
    return _block(e.d, np.stack([grid, _signs_and_scale(e)], axis=-1))


def iq2_xs(e: Encoded) -> np.ndarray:
    grid = e.codes.astype(np.uint16) | _signs(e, 7).astype(np.uint16) << np.uint16(9)
    return _block(e.d, grid, _runs(e.scale_codes, 4, 1).astype(np.uint8))


def iq2_s(e: Encoded) -> np.ndarray:
    return _block(e.d, _low_byte(e), _signs(e, 8), _runs(e.codes >> 8, 2, 1), _runs(e.scale_codes, 4, 1))


def iq3_xxs(e: Encoded) -> np.ndarray:
    return _block(e.d, _low_byte(e), _signs_and_scale(e))


def iq3_s(e: Encoded) -> np.ndarray:
    return _block(e.d, _low_byte(e), _runs(e.codes >> 8, 1, 1), _signs(e, 8), _runs(e.scale_codes, 4, 1))


def _low_byte(e: Encoded) -> np.ndarray:
    return (e.codes & 255).astype(np.uint8)


def iq1_s(e: Encoded) -> np.ndarray:
    """Bit 11 of a code is the sign of the offset, which the four codes of a group share."""
    codes = e.codes.reshape(len(e.codes), -1, 4)
    high = _merge(codes >> 8 & 7, 3, np.uint16)
    offset = codes[:, :, 0] >> 11
    return _block(e.d, _low_byte(e), high | (e.scale_codes | offset << 3).astype(np.uint16) << np.uint16(12))


def iq1_m(e: Encoded) -> np.ndarray:
    """The bits of the super-scale fill the top nibbles of the four words that hold the group scales."""
    scales = _merge(e.scale_codes.reshape(len(e.codes), 4, 4), 3, np.uint16)
    d = e.d.astype(np.float16).view(np.uint16) >> np.array([0, 4, 8, 12], np.uint16)
    return _block(_low_byte(e), _runs(e.codes >> 8, 4, 1), scales | (d & np.uint16(15)) << np.uint16(12))
