"""Searches behind the quantizer: the scale, the minimum and the codes that lose least, block by block.

Every routine minimizes a weighted squared error, sum(w * (x - decoded)^2). For given codes the best scale is a linear
least-squares problem with a closed form; for a given scale the best codes are the nearest ones. The searches try a few
scales around the one that maps a group's extreme onto the outermost code, keep the best, and alternate the two steps.

Compiled by Numba and kept in one file, because Numba's disk cache notices an edit only in a function's own file.
Arrays are C-contiguous float32 and finite.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

# Sums may be reordered into SIMD lanes; a zero divisor gives inf or nan instead of a Python exception.
_compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})

_ZERO = np.float32(0)
_ONE = np.float32(1)


class Codebook(NamedTuple):
    """The values that codes stand for at scale 1: low, low + 1, ... high."""

    low: np.float32
    high: np.float32


@_compiled
def _nearest(x, inverse, book, unit):
    """unit[i] becomes the codebook value nearest to x[i] * inverse."""
    for i in range(x.size):
        step = np.rint(x[i] * inverse - book.low) + book.low
        unit[i] = min(max(step, book.low), book.high)


@_compiled
def _correlate(x, w, unit):
    """sum(w x u) and sum(w u u): their quotient is the best scale for these codes."""
    dot = norm = _ZERO
    for i in range(x.size):
        wu = w[i] * unit[i]
        dot += wu * x[i]
        norm += wu * unit[i]
    return dot, norm


@_compiled
def _extreme(x):
    """The element of largest magnitude, with its sign."""
    low = high = x[0]
    for i in range(x.size):
        low = min(low, x[i])
        high = max(high, x[i])
    return high if high >= -low else low


@_compiled
def _fit_scale(x, w, book, starts, unit):
    """The best scale of one group, and its curvature: how fast the error grows with the square of a change in scale."""
    extreme = _extreme(x)
    best_dot = best_gain = _ZERO
    best_norm = _ZERO
    if extreme != _ZERO:
        for k in range(starts.size + 2):
            # After the given starting points, two steps of alternating least squares from the best of them.
            inverse = starts[k] / extreme if k < starts.size else best_norm / best_dot
            _nearest(x, inverse, book, unit)
            dot, norm = _correlate(x, w, unit)
            if dot * dot > best_gain * norm:
                best_dot, best_norm, best_gain = dot, norm, dot * dot / norm
    if best_norm == _ZERO:
        return _ZERO, _ZERO
    return best_dot / best_norm, best_norm


@_compiled
def fit_scales(x, w, book, starts):
    """Best scale of each group by itself.

    x, w: (groups, n). starts: levels onto which a group's extreme element is mapped, one try each.
    Returns the scales (groups,) and their curvatures (groups,), both float32.
    """
    groups, n = x.shape
    scales = np.empty(groups, np.float32)
    curvatures = np.empty(groups, np.float32)
    unit = np.empty(n, np.float32)
    for g in range(groups):
        scales[g], curvatures[g] = _fit_scale(x[g], w[g], book, starts, unit)
    return scales, curvatures


@_compiled
def _inverse(scale):
    return _ONE / scale if scale != _ZERO else _ZERO


@_compiled
def settle_scales(x, w, scales, super_scales, book, multipliers):
    """Chooses each group's multiplier of its block's super-scale, then the super-scale again by least squares.

    x, w: (blocks, groups, n). scales: (blocks, groups), each group's own best. super_scales: (blocks,).
    Returns the multipliers (blocks, groups), members of the codebook `multipliers`, and the super-scales (blocks,).
    """
    blocks, groups, n = x.shape
    chosen = np.empty((blocks, groups), np.float32)
    refined = np.empty(blocks, np.float32)
    unit = np.empty(n, np.float32)
    candidate = np.empty(1, np.float32)
    for b in range(blocks):
        d = super_scales[b]
        dots = norms = _ZERO
        for g in range(groups):
            best_error = best_dot = best_norm = _ZERO
            for step in (_ZERO, -_ONE, _ONE):
                _nearest(scales[b, g : g + 1], _inverse(d), multipliers, candidate)
                m = candidate[0] + step
                if m < multipliers.low or m > multipliers.high:
                    continue
                _nearest(x[b, g], _inverse(d * m), book, unit)
                dot, norm = _correlate(x[b, g], w[b, g], unit)
                error = d * m * (d * m * norm - (dot + dot))
                if step == _ZERO or error < best_error:
                    best_error, best_dot, best_norm = error, m * dot, m * m * norm
                    chosen[b, g] = m
            dots += best_dot
            norms += best_norm
        refined[b] = dots / norms if norms > _ZERO else d
    return chosen, refined


@_compiled
def encode(x, scales, book):
    """The codebook value nearest to each x over its group's scale. x: (groups, n). scales: (groups,)."""
    groups, n = x.shape
    units = np.empty((groups, n), np.float32)
    for g in range(groups):
        _nearest(x[g], _inverse(scales[g]), book, units[g])
    return units


@_compiled
def _affine_codes(x, inverse, shift, high, unit):
    for i in range(x.size):
        unit[i] = min(max(np.rint((x[i] - shift) * inverse), _ZERO), high)


@_compiled
def _affine_correlate(x, w, unit):
    """sum(w u), sum(w u u) and sum(w x u)."""
    first = second = dot = _ZERO
    for i in range(x.size):
        wu = w[i] * unit[i]
        first += wu
        second += wu * unit[i]
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
    unit = np.empty(n, np.float32)
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
        best_gain = total * total / weight if signed else _ZERO
        scale = curvature = _ZERO
        shift = total / weight if signed else _ZERO
        span = highest - lowest
        if span > _ZERO:
            for k in range(starts.size + 2):
                if k < starts.size:
                    _affine_codes(xs, starts[k] / span, lowest, high, unit)
                else:
                    _affine_codes(xs, _inverse(scale), shift, high, unit)
                first, second, dot = _affine_correlate(xs, ws, unit)
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
def settle_affine(x, w, scales, shifts, d, m, high, multipliers):
    """Chooses each group's multipliers of its block's super-scale d and super-shift m, then d and m by least squares.

    x, w: (blocks, groups, n). scales, shifts: (blocks, groups), each group's own best. d, m: (blocks,).
    Returns both kinds of multipliers (blocks, groups) and the refined d and m (blocks,).
    """
    blocks, groups, n = x.shape
    scale_codes = np.empty((blocks, groups), np.float32)
    shift_codes = np.empty((blocks, groups), np.float32)
    refined_d, refined_m = d.copy(), m.copy()
    unit = np.empty(n, np.float32)
    pair = np.empty(1, np.float32)
    for b in range(blocks):
        # The normal equations of (d, m) over the whole block.
        dd = dm = mm = dx = mx = _ZERO
        for g in range(groups):
            xs, ws = x[b, g], w[b, g]
            weight = total = _ZERO
            for i in range(n):
                weight += ws[i]
                total += ws[i] * xs[i]
            _nearest(scales[b, g : g + 1], _inverse(d[b]), multipliers, pair)
            scale_guess = pair[0]
            _nearest(shifts[b, g : g + 1], _inverse(m[b]), multipliers, pair)
            shift_guess = pair[0]
            best_error = _ZERO
            best = (_ZERO, _ZERO, _ZERO)
            for k in range(9):
                p = scale_guess + np.float32((k + 1) % 3 - 1)
                q = shift_guess + np.float32((k // 3 + 1) % 3 - 1)
                if min(p, q) < multipliers.low or max(p, q) > multipliers.high:
                    continue
                scale, shift = d[b] * p, m[b] * q
                _affine_codes(xs, _inverse(scale), shift, high, unit)
                first, second, dot = _affine_correlate(xs, ws, unit)
                error = scale * (scale * second - (dot + dot)) + shift * (shift * weight - (total + total))
                error += (scale + scale) * shift * first
                if k == 0 or error < best_error:
                    best_error, best = error, (first, second, dot)
                    scale_codes[b, g], shift_codes[b, g] = p, q
            first, second, dot = best
            p, q = scale_codes[b, g], shift_codes[b, g]
            dd += p * p * second
            dm += p * q * first
            mm += q * q * weight
            dx += p * dot
            mx += q * total
        determinant = dd * mm - dm * dm
        if determinant > _ZERO:
            refined_d[b] = (mm * dx - dm * mx) / determinant
            refined_m[b] = (dd * mx - dm * dx) / determinant
        elif dd > _ZERO:
            refined_d[b] = dx / dd
    return scale_codes, shift_codes, refined_d, refined_m


@_compiled
def encode_affine(x, scales, shifts, high):
    """Codes 0 to high of x = scale * code + shift. x: (groups, n). scales, shifts: (groups,)."""
    groups, n = x.shape
    codes = np.empty((groups, n), np.float32)
    for g in range(groups):
        _affine_codes(x[g], _inverse(scales[g]), shifts[g], high, codes[g])
    return codes
