"""Attention over the paged cache: Numba's kernel, or blocks of NumPy products where Numba is missing."""

from __future__ import annotations

import numpy as np
import torch

from trichord.cpu_fallback.cache_8bit import dequantized
from trichord.cpu_fallback.jit import have_numba
from trichord.cpu_fallback.rotary import rotary_and_cache

Fresh = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor, bool]
"""New keys and values, cos, sin, slots and `interleaved`, as `rotary_and_cache` describes them."""

_BLOCK_TOKENS, _BLOCK_KEYS = 128, 1024
"""NumPy's scores at a time, for every head: large enough for BLAS, small enough for long contexts."""


def attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lengths: torch.Tensor,
    max_query: int,
    scale: float,
    precision: str,
    *,
    causal: bool = True,
    window: int = 0,
    chunked: bool = False,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    fresh: Fresh | None = None,
    prepare: bool = False,
) -> torch.Tensor:
    """Attention of q (T, H, D) float32 over the paged cache -> (T, H, Dv) float32, contiguous.

    key_cache (P, G, page, D), contiguous, and value_cache (P, G, page, Dv), contiguous or a view of adjacent elements
    of such a cache (a latent's values among its keys), float32 or float16; or both int8 and contiguous, with key_scales
    (P, G, page, ceil(D/32)) and value_scales float16. page: a multiple of 16. Sequence s owns the rows
    query_starts[s]:query_starts[s+1] of q (query_starts (S+1,) int32), the last of its context_lengths[s] (S,) int32
    positions; position p lies in page page_tables[s, p // page] (page_tables (S, max_pages) int32). Query head h reads
    key head h // (H / G). The elements of a head of q must be adjacent. Every precision computes in float32.

    A query at position p sees positions up to p (all, unless `causal`), of these with a window W only those after
    p - W, or, `chunked`, those from p // W * W on; pages before all of these are not touched. A score s becomes
    soft_cap * tanh(s / soft_cap) where that is not 0 (Gemma 2), then gains slopes[h] * (key position - p) (slopes
    (H,): ALiBi, Press et al., 2022). sinks (H,) are a further score of each head, without a value, in the softmax's
    sum (Xiao et al., 2024). `fresh` keys and values are written and q is turned first, by `rotary_and_cache`. With
    `prepare`, the result is a view of it, (T, H * Dv): there is no more to prepare. Raises ValueError for pages or
    caches of another shape.
    """
    if value_cache.shape[2] % 16:
        raise ValueError(f"a page must hold a multiple of 16 positions, not {value_cache.shape[2]}")
    if value_scales is not None and value_cache.stride(2) != value_cache.shape[3]:
        raise ValueError("values of 8 bits must have a cache of their own, not lie among the keys")
    if fresh is not None:
        k, v, cos, sin, slots, interleaved = fresh
        caches = key_cache, None if v is None else value_cache
        scales = {"key_scales": key_scales, "value_scales": value_scales}
        rotary_and_cache(q, k, v, cos, sin, *caches, slots, interleaved, **scales)
    output = torch.empty((*q.shape[:2], value_cache.shape[3]), dtype=torch.float32)
    variant = causal, window, chunked, soft_cap, sinks, slopes
    if not have_numba():
        caches = [
            [part.numpy() for part in parts if part is not None]
            for parts in ((key_cache, key_scales), (value_cache, value_scales))
        ]
        starts, lengths = query_starts.tolist(), context_lengths.tolist()
        for start, stop, length, pages in zip(starts, starts[1:], lengths, page_tables.numpy(), strict=False):
            for first in range(start, stop, _BLOCK_TOKENS):
                last = min(first + _BLOCK_TOKENS, stop)
                block = q[first:last].numpy() * np.float32(scale)
                mean = _attend(block, *caches, pages, length - stop + first, length, *variant)
                output[first:last] = torch.from_numpy(mean)
        return output.flatten(1) if prepare else output
    from trichord.cpu_fallback.attention_kernel import attend

    paged = q, key_cache, value_cache, page_tables, query_starts, context_lengths
    attend(*paged, output, max_query, scale, *variant, key_scales, value_scales)
    return output.flatten(1) if prepare else output


def _attend(
    q: np.ndarray,
    keys: list[np.ndarray],
    values: list[np.ndarray],
    pages: np.ndarray,
    position: int,
    length: int,
    causal: bool,
    window: int,
    chunked: bool,
    soft_cap: float,
    sinks: torch.Tensor | None,
    slopes: torch.Tensor | None,
) -> np.ndarray:
    """One sequence's scaled queries (T, H, D), the first at `position`, over blocks of its context: online softmax.

    keys and values are a cache, or one of 8 bits and its scales.
    """
    tokens, heads, size = q.shape
    _, kv_heads, page, value_size = values[0].shape
    group = heads // kv_heads
    q = q.reshape(tokens, kv_heads, group, size).swapaxes(0, 1).reshape(kv_heads, -1, size)  # rows (token, head)
    positions = position + np.arange(tokens).repeat(group)[:, None]
    first = np.zeros_like(positions)
    if window:
        first = positions // window * window if chunked else np.maximum(positions - window + 1, 0)
    last = positions if causal else np.full_like(positions, length - 1)

    def of_rows(numbers: torch.Tensor) -> np.ndarray:
        return np.tile(numbers.numpy().reshape(kv_heads, group, 1), (1, tokens, 1))

    # A sink is a score that was met before the first key; without one, a finite number: no row may give NaN.
    largest = np.full((kv_heads, q.shape[1], 1), -1e30, np.float32) if sinks is None else of_rows(sinks)
    total, sums = np.float32(sinks is not None), np.float32(0)
    for start in range(first.min(), last.max() + 1, _BLOCK_KEYS):
        stop = min(start + _BLOCK_KEYS, last.max() + 1)
        inside = slice(start % page, start % page + stop - start)
        read = pages[start // page : -(-stop // page)]
        key, value = (
            _floats(*(part[read].swapaxes(0, 1).reshape(kv_heads, -1, part.shape[3])[:, inside] for part in cache))
            for cache in (keys, values)
        )
        scores = q @ key.swapaxes(1, 2)
        if soft_cap:
            scores = soft_cap * np.tanh(scores / soft_cap)
        block = np.arange(start, stop)
        if slopes is not None:
            scores += of_rows(slopes) * (block - positions)
        scores[:, (block < first) | (block > last)] = -np.inf
        new_largest = np.maximum(largest, scores.max(axis=2, keepdims=True))
        weights, decay = np.exp(scores - new_largest), np.exp(largest - new_largest)
        sums = sums * decay + weights @ value
        total = total * decay + weights.sum(axis=2, keepdims=True)
        largest = new_largest
    means = (sums / total).reshape(kv_heads, tokens, -1, value_size)
    return means.swapaxes(0, 1).reshape(tokens, heads, value_size)


def _floats(numbers: np.ndarray, scales: np.ndarray | None = None) -> np.ndarray:
    return numbers.astype(np.float32) if scales is None else dequantized(numbers, scales)
