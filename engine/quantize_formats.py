"""Quantizing rows of weights into the blocks of each format.

A format is two decisions: a search (`quantize_search`: which scales and codes lose least) and a packing (how the
chosen integers lie in the block). The block layouts are ggml's; the search is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from trichord import quantize_search as search
from trichord.weight_format import WeightFormat


def _sensitivity(x: np.ndarray, importance: np.ndarray | None, columns: int) -> np.ndarray:
    """How much an error in each weight of x (blocks, block_size) counts.

    The importance of its column, times sqrt(mean square of the block + its own square): large weights matter more to
    a model's output than their share of the squared error (ggml's rule for its importance-weighted quantizers).
    """
    w = np.sqrt(np.mean(np.square(x), axis=1, keepdims=True) + np.square(x))
    if importance is not None:
        w = (w.reshape(-1, columns) * importance).reshape(x.shape)
    # All-zero weights would leave nothing to minimize; the floor only matters there.
    return np.maximum(w, np.float32(1e-30), dtype=np.float32)


def _half(d: np.ndarray) -> np.ndarray:
    """Rounded to what a float16 field can hold; a scale beyond its range is cut to the largest."""
    return np.clip(d, -65504, 65504).astype(np.float16)


def _bytes(*fields: np.ndarray) -> np.ndarray:
    """Block fields, each (blocks, ...) of any dtype, side by side as bytes (blocks, block_bytes)."""
    return np.concatenate([np.ascontiguousarray(f).view(np.uint8).reshape(len(f), -1) for f in fields], axis=1)


def _starts(level: float, width: float, count: int) -> np.ndarray:
    """`count` levels around `level`, `width` to either side: where a search maps a group's extreme."""
    return np.linspace(level - width, level + width, count, dtype=np.float32)


class _Quantizer(Protocol):
    def __call__(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        """x, w (blocks, block_size) float32 -> (blocks, block_bytes) uint8."""


@dataclass(frozen=True)
class _Scaled:
    """Groups of `group` weights, each code times super-scale times the group's multiplier.

    levels: the range of the codes. multipliers: the range of a group's multiplier, or (1, 1) where a group is a block.
    pack: codes (blocks, block_size) counted from zero, multipliers (blocks, groups), super-scale (blocks, 1) -> bytes.
    """

    group: int
    levels: tuple[float, float]
    multipliers: tuple[float, float]
    starts: np.ndarray
    pack: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

    def __call__(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        blocks = len(x)
        book, multipliers = _book(self.levels), _book(self.multipliers)
        flat, weights = x.reshape(-1, self.group), w.reshape(-1, self.group)
        scales, curvatures = (a.reshape(blocks, -1) for a in search.fit_scales(flat, weights, book, self.starts))
        # A block's scales are quantized by the same search as its weights.
        d, _ = search.fit_scales(scales, curvatures, multipliers, _starts(_outer(self.multipliers), 1, 9))
        x3, w3 = x.reshape(blocks, -1, self.group), w.reshape(blocks, -1, self.group)
        chosen, d = search.settle_scales(x3, w3, scales, _half(d).astype(np.float32), book, multipliers)
        d = _half(d)[:, None]
        units = search.encode(flat, (d * chosen).astype(np.float32).ravel(), book)
        codes = (units - book.low).reshape(blocks, -1).astype(np.uint8)
        return self.pack(codes, chosen, d)


@dataclass(frozen=True)
class _Affine:
    """Groups of `group` weights, each code times the group's scale plus its shift.

    high: the largest code. multipliers: the largest of the integers that scale both a block's super-scale and its
    super-shift, which is never positive; 0 where each group stores scale and shift themselves.
    pack: codes (blocks, block_size), multipliers of both kinds (blocks, groups), d and m (blocks, 1) -> bytes.
    """

    group: int
    high: int
    multipliers: int
    starts: np.ndarray
    pack: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]

    def __call__(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        blocks = len(x)
        flat, weights = x.reshape(-1, self.group), w.reshape(-1, self.group)
        high = np.float32(self.high)
        scales, shifts, scale_curvatures, shift_curvatures = (
            a.reshape(blocks, -1) for a in search.fit_affine(flat, weights, high, self.starts, self.multipliers == 0)
        )
        multipliers = _book((0, self.multipliers) if self.multipliers else (1, 1))
        starts = _starts(float(multipliers.high), 1, 9)
        d, _ = search.fit_scales(scales, scale_curvatures, multipliers, starts)
        m, _ = search.fit_scales(shifts, shift_curvatures, multipliers, starts)
        x3, w3 = x.reshape(blocks, -1, self.group), w.reshape(blocks, -1, self.group)
        d, m = _half(d).astype(np.float32), _half(m).astype(np.float32)
        p, q, d, m = search.settle_affine(x3, w3, scales, shifts, d, m, high, multipliers)
        d, m = _half(d)[:, None], _half(m)[:, None]
        codes = search.encode_affine(flat, (d * p).astype(np.float32).ravel(), (m * q).astype(np.float32).ravel(), high)
        return self.pack(codes.reshape(blocks, -1).astype(np.uint8), p.astype(np.uint8), q.astype(np.uint8), d, m)


def _book(levels: tuple[float, float]) -> search.Codebook:
    return search.Codebook(np.float32(levels[0]), np.float32(levels[1]))


def _outer(levels: tuple[float, float]) -> float:
    return max(levels, key=abs)


def _nibbles(codes: np.ndarray, run: int) -> np.ndarray:
    """Low halves of the codes: each run of `run` in the low nibbles of `run` bytes, the next run in the high ones."""
    pairs = (codes & 15).reshape(len(codes), -1, 2, run)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(codes), -1)


def _pack_q4_0(codes, multipliers, d):
    return _bytes(d, _nibbles(codes, 16))


def _pack_q5_0(codes, multipliers, d):
    return _bytes(d, np.packbits(codes >> 4, axis=1, bitorder="little"), _nibbles(codes, 16))


def _pack_q8_0(codes, multipliers, d):
    return _bytes(d, codes + np.uint8(129))


def _pack_q6_k(codes, multipliers, d):
    high = (codes >> 4).reshape(len(codes), 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return _bytes(_nibbles(codes, 64), np.bitwise_or.reduce(high, axis=2), multipliers.astype(np.int8), d)


def _six_bit_pairs(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The 12 bytes of Q4_K and Q5_K that hold eight 6-bit scale multipliers and eight shift multipliers.

    Bytes 0 to 3 and 4 to 7 hold the first four of each; bytes 8 to 11 the low nibbles of the last four, whose upper
    two bits fill the top of the first eight bytes.
    """
    return np.concatenate(
        [
            p[:, :4] | (p[:, 4:] >> 4) << 6,
            q[:, :4] | (q[:, 4:] >> 4) << 6,
            (p[:, 4:] & 15) | (q[:, 4:] & 15) << 4,
        ],
        axis=1,
    )


def _pack_q4_k(codes, p, q, d, m):
    return _bytes(d, -m, _six_bit_pairs(p, q), _nibbles(codes, 32))


def _pack_q5_k(codes, p, q, d, m):
    # Bit g of byte i is the fifth bit of weight i of group g.
    high = np.packbits(codes.reshape(-1, 8, 32) >> 4, axis=1, bitorder="little")
    return _bytes(d, -m, _six_bit_pairs(p, q), high, _nibbles(codes, 32))


_QUANTIZERS: dict[WeightFormat, _Quantizer] = {
    WeightFormat.Q4_0: _Scaled(32, (-8, 7), (1, 1), _starts(-8, 1, 19), _pack_q4_0),
    WeightFormat.Q5_0: _Scaled(32, (-16, 15), (1, 1), _starts(-16, 1, 19), _pack_q5_0),
    WeightFormat.Q8_0: _Scaled(32, (-127, 127), (1, 1), _starts(127, 0, 1), _pack_q8_0),
    WeightFormat.Q4_K: _Affine(32, 15, 63, _starts(15, 1, 21), _pack_q4_k),
    WeightFormat.Q5_K: _Affine(32, 31, 63, _starts(31, 1, 21), _pack_q5_k),
    WeightFormat.Q6_K: _Scaled(16, (-32, 31), (-128, 127), _starts(-32, 1, 19), _pack_q6_k),
}


def _pack_bfloat16(x: np.ndarray) -> np.ndarray:
    """The upper half of each float32, rounded to nearest, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)


_CASTS: dict[WeightFormat, Callable[[np.ndarray], np.ndarray]] = {
    WeightFormat.F32: lambda x: x,
    WeightFormat.F16: lambda x: _half(x),
    WeightFormat.BF16: _pack_bfloat16,
}


def quantize_rows(values: np.ndarray, format: WeightFormat, importance: np.ndarray | None = None) -> np.ndarray:
    """Rows of weights as GGUF blocks.

    values: (rows, columns) float32, finite. importance: (columns,) float32, the mean square of the activations that
    meet each column (an importance matrix), or None to count every column alike. Returns (rows, row_bytes) uint8.
    Raises ValueError when the columns do not fill whole blocks or the format has no quantizer.
    """
    row_bytes = format.row_bytes(values.shape[1])
    values = np.ascontiguousarray(values, np.float32)
    if format in _CASTS:
        return _CASTS[format](values).view(np.uint8).reshape(len(values), row_bytes)
    if format not in _QUANTIZERS:
        raise ValueError(f"there is no quantizer for {format.name}")
    x = values.reshape(-1, format.block_size)
    w = _sensitivity(x, importance, values.shape[1])
    return _QUANTIZERS[format](x, w).reshape(len(values), row_bytes)
