"""Rotary position embedding, and the write of the new keys and values into the paged cache."""

from __future__ import annotations

import numpy as np
import torch

from trichord.cpu_fallback.cache_8bit import quantized
from trichord.cpu_fallback.jit import have_numba


def rotary_and_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor | None,
    slots: torch.Tensor,
    interleaved: bool,
    *,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Rotates q (T, H, D) in place; writes the rotated k (T, G, D) and v (T, G, Dv) at `slots` (T,) int64.

    cos, sin (T, R/2), contiguous, rotate the first R <= D elements: pairs (2i, 2i+1) when interleaved (Su et al.,
    2021), else (i, i + R/2) (GPT-NeoX); the rest passes through, with R = 0 all. Caches are (P, G, page, D) and
    (P, G, page, Dv), contiguous, float32, float16, or int8: then with key_scales (P, G, page, ceil(D/32)) and
    value_scales, contiguous, float16. slot = page index * page + offset. Without v only the keys are written. q, k and
    v may be slices of one product: only the elements of a head must be adjacent.
    """
    tokens, heads, size = q.shape
    kv_heads, page, pairs = k.shape[1], key_cache.shape[2], cos.shape[1]
    if not have_numba():
        pages, offsets = np.divmod(slots.numpy(), page)
        rotated = k.numpy().copy()
        for x in (q.numpy(), rotated):
            _rotate(x, cos.numpy()[:, None], sin.numpy()[:, None], interleaved)
        written = [(rotated, key_cache, key_scales)]
        if v is not None:
            written.append((v.numpy(), value_cache, value_scales))
        for x, cache, scales in written:
            if scales is not None:
                x, scales.numpy()[pages, :, offsets] = quantized(x)
            cache.numpy()[pages, :, offsets] = x
        return
    from trichord.cpu_fallback.token_kernels import rotate_and_store

    value_place, value_size = ((0, 0, 0), 0) if v is None else (_place(v), v.shape[2])
    inputs = *_place(q), *_place(k), *value_place, cos.data_ptr(), sin.data_ptr()
    caches = None if v is None else value_cache, key_scales, value_scales
    targets = key_cache.data_ptr(), *(0 if x is None else x.data_ptr() for x in caches), slots.data_ptr()
    geometry = heads, kv_heads, size, value_size, pairs, page, key_cache.itemsize, interleaved
    rotate_and_store(tokens, (heads + kv_heads) * size, *inputs, *targets, *geometry)


def _place(x: torch.Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> None:
    """Turns the pairs of x (T, heads, D) in place."""
    pairs = cos.shape[-1]
    left = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
    right = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    a, b = x[..., left].copy(), x[..., right].copy()
    x[..., left], x[..., right] = a * cos - b * sin, a * sin + b * cos
