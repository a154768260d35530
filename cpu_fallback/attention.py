"""Causal attention over the paged cache: Numba's kernel, or blocks of NumPy products where Numba is missing."""

from __future__ import annotations

import numpy as np
import torch

from trichord.cpu_fallback.jit import have_numba

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
) -> torch.Tensor:
    """Causal attention of q (T, H, D) float32 over the paged cache -> (T, H, Dv) float32, contiguous.

    key_cache (P, G, page, D) and value_cache (P, G, page, Dv), contiguous, float32 or float16; page a multiple of 16.
    Sequence s owns the rows query_starts[s]:query_starts[s+1] of q (query_starts (S+1,) int32), the last of its
    context_lengths[s] (S,) int32 positions; position p lies in page page_tables[s, p // page] (page_tables
    (S, max_pages) int32). Query head h reads key head h // (H / G). The elements of a head of q must be adjacent.
    Every precision computes in float32.
    """
    if value_cache.shape[2] % 16:
        raise ValueError(f"a page must hold a multiple of 16 positions, not {value_cache.shape[2]}")
    output = torch.empty((*q.shape[:2], value_cache.shape[3]), dtype=torch.float32)
    if not have_numba():
        keys, values = key_cache.numpy(), value_cache.numpy()
        starts, lengths = query_starts.tolist(), context_lengths.tolist()
        for start, stop, length, pages in zip(starts, starts[1:], lengths, page_tables.numpy(), strict=False):
            for first in range(start, stop, _BLOCK_TOKENS):
                last = min(first + _BLOCK_TOKENS, stop)
                block = q[first:last].numpy() * np.float32(scale)
                output[first:last] = torch.from_numpy(_attend(block, keys, values, pages, length - stop + first))
        return output
    from trichord.cpu_fallback.attention_kernel import attend

    attend(q, key_cache, value_cache, page_tables, query_starts, context_lengths, output, max_query, scale)
    return output


def _attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray, pages: np.ndarray, position: int) -> np.ndarray:
    """One sequence's scaled queries (T, H, D), the first at `position`, over blocks of its context: online softmax."""
    tokens, heads, size = q.shape
    _, kv_heads, page, value_size = values.shape
    q = q.reshape(tokens, kv_heads, -1, size).swapaxes(0, 1).reshape(kv_heads, -1, size)  # rows (token, head of group)
    positions = position + np.arange(q.shape[1]) // (heads // kv_heads)
    largest = np.full((kv_heads, q.shape[1], 1), -np.inf, np.float32)
    total, sums = np.float32(0), np.float32(0)
    for start in range(0, position + tokens, _BLOCK_KEYS):
        stop = min(start + _BLOCK_KEYS, position + tokens)
        key, value = (
            cache[pages[start // page : -(-stop // page)]].swapaxes(0, 1).reshape(kv_heads, -1, cache.shape[3])
            for cache in (keys, values)
        )
        scores = q @ key[:, : stop - start].astype(np.float32).swapaxes(1, 2)
        scores[:, np.arange(start, stop) > positions[:, None]] = -np.inf
        new_largest = np.maximum(largest, scores.max(axis=2, keepdims=True))
        weights, decay = np.exp(scores - new_largest), np.exp(largest - new_largest)
        sums = sums * decay + weights @ value[:, : stop - start].astype(np.float32)
        total = total * decay + weights.sum(axis=2, keepdims=True)
        largest = new_largest
    means = (sums / total).reshape(kv_heads, tokens, -1, value_size)
    return means.swapaxes(0, 1).reshape(tokens, heads, value_size)
