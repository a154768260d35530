"""Searches behind the quantizer: the scale, the minimum and the codes that lose least, block by block.

Every routine minimizes a weighted squared error, sum(w * (x - decoded)^2). For given codes the best scale is a linear
least-squares problem with a closed form; for a given scale the best codes are the nearest ones. The searches try a few
scales around the one that maps a group's extreme onto the outermost code, keep the best, and alternate the two steps.

Compiled by Numba and kept in one file, because Numba's disk cache notices an edit only in a function's own file.
Arrays are C-contiguous float32 and finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import njit

# Sums may be reordered into SIMD lanes; a zero divisor gives inf or nan instead of a Python exception.
_OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}

# Into the caller, because passing a codebook costs more than a group's arithmetic.
_inlined = njit(inline="always", **_OPTIONS)


def _compiled(function: Callable) -> Callable:
    try:
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # there is no directory where the machine code could be kept
        return njit(**_OPTIONS)(function)


_ZERO = np.float32(0)
_ONE = np.float32(1)
_SMALLEST = np.float32(1e-37)


class Codebook(NamedTuple):
    """The values that codes stand for at scale 1.

    Three kinds, told apart by which arrays are empty: low, low + 1, ... high; the sorted `levels`; or `vectors`, each
    of which serves several neighbouring weights at once. A vector is found by rounding the weights to `levels`, reading
    the rounded point as a number in base len(levels), and searching that point's `shortlist` only.
    """

    low: np.float32
    high: np.float32
    levels: np.ndarray  # (n,) float32
    edges: np.ndarray  # (n - 1,) float32: halfway between neighbouring levels
    vectors: np.ndarray  # (size, width) float32
    shortlist: np.ndarray  # (alternatives, len(levels) ** width, near) int16; a group keeps to one alternative
    signs: np.int64  # vectors are of magnitudes, the sign of each weight being stored: NO_SIGNS, FREE_SIGNS, EVEN_SIGNS


NO_SIGNS, FREE_SIGNS, EVEN_SIGNS = 0, 1, 2  # EVEN: of every 8 weights an even number is negative


@_inlined
def _nearest(x, w, inverse, book, unit, index):
    """unit[i] becomes the codebook value nearest to x[i] * inverse; index[j] that of its j-th vector."""
    if book.vectors.size:
        _nearest_vectors(x, w, inverse, book, unit, index)
    elif book.levels.size:
        _nearest_levels(x, inverse, book.levels, book.edges, unit)
    else:
        for i in range(x.size):
            unit[i] = _round(x[i] * inverse, book.low, book.high)


@_compiled
def _nearest_levels(x, inverse, levels, edges, unit):
    unit[:] = levels[0]
    for k in range(edges.size):
        edge, level = edges[k], levels[k + 1]
        for i in range(x.size):
            unit[i] = level if x[i] * inverse > edge else unit[i]


@_compiled
def _nearest_vectors(x, w, inverse, book, unit, index):
    """Of each vector's shortlist the one of least weighted error; in a group of alternatives those of least in all."""
    width = book.vectors.shape[1]
    base = book.levels.size
    y = np.empty(x.size, np.float32)
    sign = np.ones(x.size, np.float32)
    if book.signs == NO_SIGNS:
        for i in range(x.size):
            y[i] = x[i] * inverse
    else:
        for i in range(x.size):
            sign[i] = -_ONE if x[i] < _ZERO else _ONE
            y[i] = abs(x[i]) * abs(inverse)
        if book.signs == EVEN_SIGNS:
            _make_even(y, w, sign)
    best_total = np.float32(np.inf)
    found = np.empty(x.size // width, np.int32)
    for alternative in range(book.shortlist.shape[0]):
        total = _ZERO
        for j in range(x.size // width):
            point, place = 0, 1
            for i in range(j * width, (j + 1) * width):
                digit = 0
                for k in range(book.edges.size):
                    digit += y[i] > book.edges[k]
                point += digit * place
                place *= base
            best = np.float32(np.inf)
            found[j] = book.shortlist[alternative, point, 0]
            for candidate in book.shortlist[alternative, point]:
                error = _ZERO
                for i in range(width):
                    miss = y[j * width + i] - book.vectors[candidate, i]
                    error += w[j * width + i] * miss * miss
                if error < best:
                    best, found[j] = error, candidate
            total += best
        if alternative == 0 or total < best_total:
            best_total = total
            for j in range(x.size // width):
                index[j] = found[j]
    for i in range(x.size):
        unit[i] = sign[i] * book.vectors[index[i // width], i % width]


@_compiled
def _make_even(y, w, sign):
    """Where an odd number of 8 neighbours is negative, turns the one whose wrong sign costs least."""
    for start in range(0, y.size, 8):
        product = _ONE
        cheapest, cost = start, np.float32(np.inf)
        for i in range(start, start + 8):
            product *= sign[i]
            if w[i] * y[i] * y[i] < cost:
                cheapest, cost = i, w[i] * y[i] * y[i]
        if product < _ZERO:
            sign[cheapest] = -sign[cheapest]
            y[cheapest] = -y[cheapest]


@_inlined
def _match(x, w, inverse, book, unit, index):
    """sum(w x u) and sum(w u u) for the nearest values u: their quotient is the best scale for these codes."""
    if not book.levels.size:
        return _match_range(x, w, inverse, book.low, book.high)
    _nearest(x, w, inverse, book, unit, index)
    dot = norm = _ZERO
    for i in range(x.size):
        wu = w[i] * unit[i]
        dot += wu * x[i]
        norm += wu * unit[i]
    return dot, norm


@_inlined
def _match_range(x, w, inverse, low, high):
    """The same in one pass that stores nothing, several times faster."""
    dot = norm = _ZERO
    for i in range(x.size):
        u = _round(x[i] * inverse, low, high)
        wu = w[i] * u
        dot += wu * x[i]
        norm += wu * u
    return dot, norm


@_compiled
def _round(y, low, high):
    """The nearest of low, low + 1, ... high."""
    return min(max(np.rint(y - low) + low, low), high)


@_compiled
def _extreme(x):
    """The element of largest magnitude, with its sign."""
    low = high = x[0]
    for i in range(x.size):
        low = min(low, x[i])
        high = max(high, x[i])
    return high if high >= -low else low


@_compiled
def _code(value, book):
    """The number of a member of a codebook of numbers."""
    if book.levels.size:
        return np.searchsorted(book.edges, value)
    return np.int64(value - book.low)


@_compiled
def _member(code, book):
    return book.levels[code] if book.levels.size else book.low + np.float32(code)


@_compiled
def _size(book):
    return book.levels.size if book.levels.size else np.int64(book.high - book.low) + 1


@_compiled
def _inverse(scale):
    """1 / scale, or 0 for a scale whose inverse is no float32."""
    return _ONE / scale if abs(scale) > _SMALLEST else _ZERO


@_inlined
def _fit_scale(x, w, book, starts, signed, unit, index):
    """The best scale of one group, and its curvature: how fast the error grows with the square of a change in scale."""
    extreme = _extreme(x) if signed else abs(_extreme(x))
    best_dot = best_norm = best_gain = _ZERO
    if extreme != _ZERO:
        for k in range(starts.size + 2):
            # After the given starting points, two steps of alternating least squares from the best of them.
            inverse = starts[k] / extreme if k < starts.size else best_norm / best_dot
            dot, norm = _match(x, w, inverse, book, unit, index)
            if dot * dot > best_gain * norm:
                best_dot, best_norm, best_gain = dot, norm, dot * dot / norm
    if best_norm == _ZERO:
        return _ZERO, _ZERO
    return best_dot / best_norm, best_norm


@_compiled
def fit_scales(x, w, book, starts, signed):
    """Best scale of each group by itself.

    x, w: (groups, n). starts: levels onto which a group's extreme element is mapped, one try each.
    signed: whether a scale may be negative, which turns an asymmetric codebook around.
    Returns the scales (groups,) and their curvatures (groups,), both float32.
    """
    groups, n = x.shape
    scales = np.empty(groups, np.float32)
    curvatures = np.empty(groups, np.float32)
    unit, index = np.empty(n, np.float32), np.empty(n, np.int32)
    for g in range(groups):
        scales[g], curvatures[g] = _fit_scale(x[g], w[g], book, starts, signed, unit, index)
    return scales, curvatures


@_compiled
def choose_multiples(x, w, scales, d, book, multiples):
    """Which multiple of its block's super-scale serves each group best: the one nearest to its own scale, or the next.

    x, w: (blocks, groups, n). scales: (blocks, groups), each group's own best. d: (blocks, 1), the super-scales.
    Returns the multiples' numbers in their codebook (blocks, groups) int32.
    """
    blocks, groups, n = x.shape
    chosen = np.empty((blocks, groups), np.int32)
    unit, index = np.empty(n, np.float32), np.empty(n, np.int32)
    nearest = np.empty(1, np.float32)
    for b in range(blocks):
        for g in range(groups):
            _nearest(scales[b, g : g + 1], w[b, g], _inverse(d[b, 0]), multiples, nearest, index)
            guess = _code(nearest[0], multiples)
            chosen[b, g] = guess
            best_error = np.float32(np.inf)
            for code in range(max(guess - 1, 0), min(guess + 2, _size(multiples))):
                scale = d[b, 0] * _member(code, multiples)
                dot, norm = _match(x[b, g], w[b, g], _inverse(scale), book, unit, index)
                error = scale * (scale * norm - (dot + dot))
                if error < best_error:
                    best_error = error
                    chosen[b, g] = code
    return chosen


@_compiled
def encode(x, w, scales, book):
    """The members of the codebook nearest to each group over its scale.

    x, w: (groups, n). scales: (groups,). Returns codes (groups, n) uint16, or (groups, n // width) for vectors, and
    the values they stand for (groups, n) float32.
    """
    groups, n = x.shape
    units = np.empty((groups, n), np.float32)
    width = book.vectors.shape[1]
    codes = np.empty((groups, n // width), np.uint16)
    index = np.empty(n, np.int32)
    for g in range(groups):
        _nearest(x[g], w[g], _inverse(scales[g]), book, units[g], index)
        for j in range(codes.shape[1]):
            codes[g, j] = index[j] if book.vectors.size else _code(units[g, j], book)
    return codes, units


@_compiled
def _match_affine(x, w, inverse, shift, high):
    """sum(w u), sum(w u u) and sum(w x u) for the codes u of x = u / inverse + shift."""
    first = second = dot = _ZERO
    for i in range(x.size):
        u = min(max(np.rint((x[i] - shift) * inverse), _ZERO), high)
        wu = w[i] * u
        first += wu
        second += wu * u
        dot += wu * x[i]
    return first, second, dot


@_compiled
def fit_affine(x, w, high, starts, signed):
    """Best scale and shift of each group by itself: x is about scale * code + shift, codes 0 to high.

    x, w: (groups, n). starts: levels onto which a group's span is stretched, one try each. signed: whether a shift
    may be positive. Returns scales, shifts and the curvatures of the error in both, each (groups,) float32.
    """
    groups, n = x.shape
    scales = np.empty(groups, np.float32)
    shifts = np.empty(groups, np.float32)
    scale_curvatures = np.empty(groups, np.float32)
    shift_curvatures = np.empty(groups, np.float32)
    for g in range(groups):
        xs, ws = x[g], w[g]
        lowest = highest = xs[0]
        weight = total = _ZERO
        for i in range(n):
            lowest = min(lowest, xs[i])
            highest = max(highest, xs[i])
            weight += ws[i]
            total += ws[i] * xs[i]
        if not signed:
            lowest = min(lowest, _ZERO)
        scale = curvature = _ZERO
        shift = total / weight if signed else min(total / weight, _ZERO)
        best_gain = shift * total
        span = highest - lowest
        if span > _ZERO:
            for k in range(starts.size + 2):
                if k < starts.size:
                    first, second, dot = _match_affine(xs, ws, starts[k] / span, lowest, high)
                else:
                    first, second, dot = _match_affine(xs, ws, _inverse(scale), shift, high)
                determinant = weight * second - first * first
                if determinant <= _ZERO:
                    continue
                try_scale = (weight * dot - first * total) / determinant
                try_shift = (second * total - first * dot) / determinant
                if not signed and try_shift > _ZERO:
                    try_scale, try_shift = dot / second, _ZERO
                gain = try_scale * dot + try_shift * total
                if gain > best_gain:
                    best_gain, scale, shift, curvature = gain, try_scale, try_shift, second
        scales[g], shifts[g] = scale, shift
        scale_curvatures[g], shift_curvatures[g] = curvature, weight
    return scales, shifts, scale_curvatures, shift_curvatures


@_compiled
def choose_affine_multiples(x, w, scales, shifts, d, m, high, multiples):
    """Which multiples of its block's super-scale d and super-shift m serve each group best, of the nine nearest pairs.

    x, w: (blocks, groups, n). scales, shifts: (blocks, groups), each group's own best. d, m: (blocks, 1).
    Returns the multiples of d and of m, (blocks, groups) float32.
    """
    blocks, groups, n = x.shape
    scale_multiples = np.empty((blocks, groups), np.float32)
    shift_multiples = np.empty((blocks, groups), np.float32)
    for b in range(blocks):
        for g in range(groups):
            xs, ws = x[b, g], w[b, g]
            weight = total = _ZERO
            for i in range(n):
                weight += ws[i]
                total += ws[i] * xs[i]
            scale_guess = _round(scales[b, g] * _inverse(d[b, 0]), multiples.low, multiples.high)
            shift_guess = _round(shifts[b, g] * _inverse(m[b, 0]), multiples.low, multiples.high)
            scale_multiples[b, g], shift_multiples[b, g] = scale_guess, shift_guess
            best_error = np.float32(np.inf)
            for k in range(9):
                p = scale_guess + np.float32(k % 3 - 1)
                q = shift_guess + np.float32(k // 3 - 1)
                if min(p, q) < multiples.low or max(p, q) > multiples.high:
                    continue
                scale, shift = d[b, 0] * p, m[b, 0] * q
                first, second, dot = _match_affine(xs, ws, _inverse(scale), shift, high)
                error = scale * (scale * second - (dot + dot)) + shift * (shift * weight - (total + total))
                error += (scale + scale) * shift * first
                if error < best_error:
                    best_error = error
                    scale_multiples[b, g], shift_multiples[b, g] = p, q
    return scale_multiples, shift_multiples


@_compiled
def encode_affine(x, scales, shifts, high):
    """Codes 0 to high of x = scale * code + shift. x: (groups, n). scales, shifts: (groups,)."""
    groups, n = x.shape
    codes = np.empty((groups, n), np.float32)
    for g in range(groups):
        inverse = _inverse(scales[g])
        for i in range(n):
            codes[g, i] = min(max(np.rint((x[g, i] - shifts[g]) * inverse), _ZERO), high)
    return codes
