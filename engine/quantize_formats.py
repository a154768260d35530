"""How each format is quantized: a search for scales and codes, then a packing.

All formats but the plain floats are one of two kinds. `Scaled`: a weight is a codebook's value times a scale.
`Affine`: a code times a scale plus a shift. In both, the groups of a block may share a super-scale, of which each
keeps a small multiple; a format whose block is one group is the case of the single multiple 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from gguf import quants

from trichord import quantize_packing as packing
from trichord import quantize_search as search
from trichord.quantize_packing import Encoded
from trichord.quantize_search import EVEN_SIGNS, FREE_SIGNS, NO_SIGNS, Codebook
from trichord.weight_format import WeightFormat


def _codebook(low: float = 0, high: float = 0, levels: np.ndarray = (), vectors: np.ndarray | None = None) -> Codebook:
    levels = np.asarray(levels, np.float32)
    return Codebook(
        np.float32(low),
        np.float32(high),
        levels,
        (levels[1:] + levels[:-1]) / 2,
        np.zeros((0, 1), np.float32) if vectors is None else vectors,
        np.zeros((0, 0, 0), np.int16),
        NO_SIGNS,
    )


def _range(low: float, high: float) -> Codebook:
    """low, low + 1, ... high."""
    return _codebook(low, high)


def _levels(levels: np.ndarray) -> Codebook:
    """Any numbers, in ascending order."""
    return _codebook(levels=levels)


def _vectors(vectors: np.ndarray, near: int, signs: int, alternatives: int = 1) -> Codebook:
    """Vectors (size, width) and, for each point they are rounded to, the `near` nearest of each alternative part."""
    book = _codebook(levels=np.unique(np.rint(vectors)), vectors=vectors)
    size, width = vectors.shape
    base = len(book.levels)
    points = book.levels[np.arange(base**width)[:, None] // base ** np.arange(width) % base]
    shortlist = []
    for part in np.split(np.arange(size), alternatives):
        distance = np.square(vectors[part]).sum(axis=1) - 2 * points @ vectors[part].T
        nearest = np.argpartition(distance, near, axis=1)[:, :near]
        order = np.argsort(np.take_along_axis(distance, nearest, axis=1), axis=1)
        shortlist.append(part[np.take_along_axis(nearest, order, axis=1)])
    return book._replace(shortlist=np.stack(shortlist).astype(np.int16), signs=signs)


def _grid(table: type) -> np.ndarray:
    """The vectors of a format of `gguf.quants`, (size, width) float32."""
    table.init_grid()
    return table.grid.reshape(table.grid_shape).astype(np.float32)


def _ternary_vectors(alternatives: int) -> Codebook:
    """IQ1's vectors moved by +1/8, then the same by -1/8; as two alternatives where a group shares its move."""
    grid, delta = _grid(quants.IQ1_S), quants.IQ1_S.delta
    return _vectors(np.concatenate([grid + delta, grid - delta]), 32, NO_SIGNS, alternatives)


def _e8m0() -> Codebook:
    """The powers of two that MXFP4 scales by (half of E8M0's, as its E2M1 values are doubled)."""
    return _levels(quants.MXFP4.e8m0_to_fp32_half(np.arange(255, dtype=np.uint8)))


def _ue4m3() -> Codebook:
    """The 8-bit floats that NVFP4 scales by, halved likewise."""
    return _levels(quants.NVFP4.ue4m3_to_fp32(np.arange(127, dtype=np.uint8)))


def _starts(*runs: tuple[float, float, int]) -> np.ndarray:
    """Levels onto which a search maps a group's extreme: `count` of them from `first` to `last`, for each run."""
    return np.concatenate([np.linspace(*run, dtype=np.float32) for run in runs])


def _ends(low: float, high: float, width: float = 1) -> np.ndarray:
    return _starts((low - width, low + width, 15), (high - width, high + width, 15))


def _multiple_starts(multiples: Codebook) -> np.ndarray:
    outermost = max(multiples.low, multiples.high, key=abs)
    return _starts((outermost - 1, outermost + 1, 9))


def _half(d: np.ndarray) -> np.ndarray:
    """Rounded to what a float16 field can hold; a scale beyond its range is cut to the largest."""
    return np.clip(d, -65504, 65504).astype(np.float16)


_ONE = _range(1, 1)


@dataclass(frozen=True)
class Scaled:
    """A weight is the codebook's value times its group's scale; the scale is d times a member of `multiples`.

    unit: the block's field holds d / unit, as a `field`; None where the format has no such field and d is 1.
    signed: whether scales may be negative, which turns an asymmetric codebook around.
    emphasis: whether large weights count for more, see `quantize_rows`.
    """

    group: int
    book: Codebook
    starts: np.ndarray
    pack: Callable[[Encoded], np.ndarray]
    multiples: Codebook = _ONE
    unit: float | None = 1
    field: type = np.float16
    signed: bool = True
    emphasis: bool = True

    def __call__(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        """x, w (blocks, block_size) float32 -> (blocks, block_bytes) uint8."""
        blocks, book, multiples = len(x), self.book, self.multiples
        x, w = x.reshape(-1, self.group), w.reshape(-1, self.group)
        x3, w3 = x.reshape(blocks, -1, self.group), w.reshape(blocks, -1, self.group)
        scales, curvatures = (a.reshape(blocks, -1) for a in search.fit_scales(x, w, book, self.starts, self.signed))
        stored, d = self._super_scales(scales, curvatures)
        scale_codes = search.choose_multiples(x3, w3, scales, d, book, multiples)
        factors = multiples.levels[scale_codes] if multiples.levels.size else multiples.low + scale_codes
        codes, units = search.encode(x, w, (d * factors).astype(np.float32).ravel(), book)
        negative = units.reshape(blocks, -1) < 0
        return self.pack(Encoded(codes.reshape(blocks, -1), scale_codes, stored, negative=negative))

    def _super_scales(self, scales: np.ndarray, curvatures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What each block's field holds and the scale it stands for, both (blocks, 1)."""
        if self.unit is None:
            ones = np.ones((len(scales), 1), np.float32)
            return ones, ones
        # A block's scales are quantized by the same search as its weights. What exceeds the field is cut.
        d, _ = search.fit_scales(scales, curvatures, self.multiples, _multiple_starts(self.multiples), True)
        largest = np.finfo(self.field).max
        stored = np.clip(d / np.float32(self.unit), -largest, largest).astype(self.field)[:, None]
        return stored, stored.astype(np.float32) * np.float32(self.unit)


@dataclass(frozen=True)
class Affine:
    """A weight is a code, 0 to `high`, times its group's scale plus the group's shift.

    The scale is d times a member of `multiples` and the shift m times another; where a block is one group the shift
    may have either sign, otherwise it is never positive.
    """

    group: int
    high: int
    pack: Callable[[Encoded], np.ndarray]
    multiples: Codebook = _ONE
    emphasis: bool = True

    def __call__(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        """x, w (blocks, block_size) float32 -> (blocks, block_bytes) uint8."""
        blocks, high, multiples = len(x), np.float32(self.high), self.multiples
        x, w = x.reshape(-1, self.group), w.reshape(-1, self.group)
        x3, w3 = x.reshape(blocks, -1, self.group), w.reshape(blocks, -1, self.group)
        fitted = search.fit_affine(x, w, high, _starts((self.high - 1, self.high + 1, 21)), x3.shape[1] == 1)
        scales, shifts, scale_curvatures, shift_curvatures = (a.reshape(blocks, -1) for a in fitted)
        starts = _multiple_starts(multiples)
        d, _ = search.fit_scales(scales, scale_curvatures, multiples, starts, True)
        m, _ = search.fit_scales(shifts, shift_curvatures, multiples, starts, True)
        d, m = _half(d)[:, None], _half(m)[:, None]
        d32, m32 = d.astype(np.float32), m.astype(np.float32)
        p, q = search.choose_affine_multiples(x3, w3, scales, shifts, d32, m32, high, multiples)
        codes = search.encode_affine(x, (d32 * p).ravel(), (m32 * q).ravel(), high)
        codes, p, q = (a.astype(np.uint8) for a in (codes.reshape(blocks, -1), p, q))
        return self.pack(Encoded(codes, p, d, q, m))


def _of_vectors(group: int, book: Codebook, starts: np.ndarray, pack: Callable, steps: int, unit: float) -> Scaled:
    """The formats of two and three bits: vectors at one of `steps` odd multiples of half the super-scale."""
    return Scaled(group, book, starts, pack, _range(0.5, steps - 0.5), unit, signed=False)


_TERNARY_STARTS = _starts((1, 4, 13))
_IQ4_STARTS = _starts((-150, -105, 12), (95, 140, 12))
_E2M1_STARTS = _starts((8, 16, 17))
_IQ1_STARTS = _starts((1, 3, 8))
_IQ2_STARTS = _starts((30, 60, 8))
_IQ3_STARTS = _starts((40, 72, 8))

_QUANTIZERS: dict[WeightFormat, Callable[[], Scaled | Affine]] = {
    WeightFormat.Q1_0: lambda: Scaled(128, _levels([-1, 1]), _starts((1, 1, 1)), packing.q1_0, emphasis=False),
    WeightFormat.Q2_0: lambda: Scaled(64, _range(-1, 2), _ends(-2.5, 2.5, 1.5), packing.q2_0, emphasis=False),
    WeightFormat.Q4_0: lambda: Scaled(32, _range(-8, 7), _ends(-8, 7), packing.q4_0),
    WeightFormat.Q4_1: lambda: Affine(32, 15, packing.q4_1),
    WeightFormat.Q5_0: lambda: Scaled(32, _range(-16, 15), _ends(-16, 15), packing.q5_0),
    WeightFormat.Q5_1: lambda: Affine(32, 31, packing.q5_1),
    WeightFormat.Q8_0: lambda: Scaled(32, _range(-127, 127), _starts((127, 127, 1)), packing.q8_0),
    WeightFormat.Q2_K: lambda: Affine(16, 3, packing.q2_k, _range(0, 15)),
    WeightFormat.Q3_K: lambda: Scaled(16, _range(-4, 3), _ends(-4, 3), packing.q3_k, _range(-32, 31)),
    WeightFormat.Q4_K: lambda: Affine(32, 15, packing.q4_k, _range(0, 63)),
    WeightFormat.Q5_K: lambda: Affine(32, 31, packing.q5_k, _range(0, 63)),
    WeightFormat.Q6_K: lambda: Scaled(16, _range(-32, 31), _ends(-32, 31), packing.q6_k, _range(-128, 127)),
    WeightFormat.Q8_K: lambda: Scaled(256, _range(-127, 127), _starts((127, 127, 1)), packing.q8_k, field=np.float32),
    WeightFormat.TQ1_0: lambda: Scaled(256, _range(-1, 1), _TERNARY_STARTS, packing.tq1_0, emphasis=False),
    WeightFormat.TQ2_0: lambda: Scaled(256, _range(-1, 1), _TERNARY_STARTS, packing.tq2_0, emphasis=False),
    WeightFormat.IQ1_S: lambda: _of_vectors(32, _ternary_vectors(2), _IQ1_STARTS, packing.iq1_s, 8, unit=2),
    WeightFormat.IQ1_M: lambda: _of_vectors(16, _ternary_vectors(1), _IQ1_STARTS, packing.iq1_m, 8, unit=2),
    WeightFormat.IQ2_XXS: lambda: _of_vectors(
        32, _vectors(_grid(quants.IQ2_XXS), 32, EVEN_SIGNS), _IQ2_STARTS, packing.iq2_xxs, 16, unit=1 / 4
    ),
    WeightFormat.IQ2_XS: lambda: _of_vectors(
        16, _vectors(_grid(quants.IQ2_XS), 32, EVEN_SIGNS), _IQ2_STARTS, packing.iq2_xs, 16, unit=1 / 4
    ),
    WeightFormat.IQ2_S: lambda: _of_vectors(
        16, _vectors(_grid(quants.IQ2_S), 16, FREE_SIGNS), _IQ2_STARTS, packing.iq2_s, 16, unit=1 / 4
    ),
    WeightFormat.IQ3_XXS: lambda: _of_vectors(
        32, _vectors(_grid(quants.IQ3_XXS), 16, EVEN_SIGNS), _IQ3_STARTS, packing.iq3_xxs, 16, unit=1 / 2
    ),
    WeightFormat.IQ3_S: lambda: _of_vectors(
        32, _vectors(_grid(quants.IQ3_S), 16, FREE_SIGNS), _IQ3_STARTS / 4, packing.iq3_s, 16, unit=2
    ),
    WeightFormat.IQ4_NL: lambda: Scaled(32, _levels(quants.IQ4_NL.kvalues), _IQ4_STARTS, packing.iq4_nl),
    WeightFormat.IQ4_XS: lambda: Scaled(
        32, _levels(quants.IQ4_NL.kvalues), _IQ4_STARTS, packing.iq4_xs, _range(-32, 31)
    ),
    WeightFormat.MXFP4: lambda: Scaled(
        32, _levels(np.unique(quants.MXFP4.kvalues)), _E2M1_STARTS, packing.mxfp4, _e8m0(), unit=None, signed=False
    ),
    WeightFormat.NVFP4: lambda: Scaled(
        16, _levels(np.unique(quants.NVFP4.kvalues)), _E2M1_STARTS, packing.nvfp4, _ue4m3(), unit=None, signed=False
    ),
}


_LARGEST = 1e9  # squares of weights, of their errors and sums of these must be float32 numbers


def _bfloat16(x: np.ndarray) -> np.ndarray:
    """The upper half of each float32, rounded to nearest, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)


_CASTS: dict[WeightFormat, Callable[[np.ndarray], np.ndarray]] = {
    WeightFormat.F32: lambda x: x,
    WeightFormat.F16: _half,
    WeightFormat.BF16: _bfloat16,
}


@cache
def _quantizer(format: WeightFormat) -> Scaled | Affine:
    if format not in _QUANTIZERS:
        raise ValueError(f"there is no quantizer for {format.name}")
    return _QUANTIZERS[format]()


def quantize_rows(values: np.ndarray, format: WeightFormat, importance: np.ndarray | None) -> np.ndarray:
    """See `trichord.quantize.quantize_blocks`.

    An error in a weight counts by the importance of its column and, where the format has `emphasis`, by
    sqrt(mean square of the block + the weight's square): large weights matter more to a model's output than their
    share of the squared error, which is ggml's rule for its importance-weighted formats.
    """
    row_bytes = format.row_bytes(values.shape[1])
    values = np.ascontiguousarray(values, np.float32)
    if format in _CASTS:
        return np.ascontiguousarray(_CASTS[format](values)).view(np.uint8).reshape(len(values), row_bytes)
    quantizer = _quantizer(format)
    if not np.abs(values).max() <= _LARGEST:  # nor is NaN
        raise ValueError(f"weights to quantize must be finite and of magnitude {_LARGEST:.0e} at most")
    w = np.ones_like(values) if importance is None else np.broadcast_to(importance.astype(np.float32), values.shape)
    x, w = values.reshape(-1, format.block_size), w.reshape(-1, format.block_size)
    if quantizer.emphasis:
        square = np.square(x)
        w = w * np.sqrt(square.mean(axis=1, keepdims=True) + square)
    # To a mean of 1, which keeps squares within float32's range; weights of no importance at all count a little.
    mean = w.mean(axis=1, keepdims=True)
    w = np.where(mean > 0, w, 1) / np.where(mean > 0, mean, 1) + np.float32(1e-6)
    return quantizer(x, w).reshape(len(values), row_bytes)
