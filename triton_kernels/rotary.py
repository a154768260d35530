"""Rotary position embedding, and the write of the new keys and values into the paged cache, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.cache_8bit import store_8bit

BLOCK_HEADS = 8


@triton.jit
def _rotated(x, cos, sin, left, right, mask):
    """The pairs (x[left], x[right]) turned by their angles."""
    a = tl.load(x + left, mask=mask, other=0.0)
    b = tl.load(x + right, mask=mask, other=0.0)
    return a * cos - b * sin, a * sin + b * cos


@triton.jit
def _rotated_columns(row, cos, sin, columns, mask, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A tile (rows, columns) of whole heads, turned: each element by its own angle and from the other of its pair."""
    if INTERLEAVED:
        pairs = columns // 2
        is_right = columns % 2 == 1
        others = columns ^ 1
    else:
        is_right = columns >= PAIRS
        pairs = tl.where(is_right, columns - PAIRS, columns)
        others = tl.where(is_right, columns - PAIRS, columns + PAIRS)
    turning = columns < 2 * PAIRS
    c = tl.load(cos + pairs, mask=turning, other=1.0)
    s = tl.load(sin + pairs, mask=turning, other=0.0)
    other = tl.load(row + others, mask=mask & turning, other=0.0)
    return tl.load(row + columns, mask=mask, other=0.0) * c + other * tl.where(is_right, s, -s)


@triton.jit
def rotary_and_cache_kernel(
    q,
    k,
    v,
    cos,
    sin,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    slots,
    query_heads,
    kv_heads,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):
    """One program a token and BLOCK_HEADS heads: first the tiles of query heads, then those of key-value heads."""
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    query_tiles = tl.cdiv(query_heads, BLOCK_HEADS)
    pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
    left = 2 * pairs if INTERLEAVED else pairs
    right = left + 1 if INTERLEAVED else left + PAIRS
    angles = token * PAIRS + pairs
    c = tl.load(cos + angles, mask=pairs < PAIRS, other=0.0)
    s = tl.load(sin + angles, mask=pairs < PAIRS, other=0.0)
    if tile < query_tiles:
        heads = tile * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
        mask = (heads < query_heads) & (pairs < PAIRS)
        row = q + token * q_token_stride + heads * q_head_stride
        a, b = _rotated(row, c, s, left, right, mask)
        tl.store(row + left, a, mask=mask)
        tl.store(row + right, b, mask=mask)
    else:
        heads = (tile - query_tiles) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
        slot = tl.load(slots + token)
        position = (slot // PAGE * kv_heads + heads) * PAGE + slot % PAGE
        row = k + token * k_token_stride + heads * k_head_stride
        if key_scales is None:
            key = key_cache + position * HEAD_SIZE
            mask = (heads < kv_heads) & (pairs < PAIRS)
            a, b = _rotated(row, c, s, left, right, mask)
            tl.store(key + left, a.to(key_cache.dtype.element_ty), mask=mask)
            tl.store(key + right, b.to(key_cache.dtype.element_ty), mask=mask)
            if HEAD_SIZE > 2 * PAIRS:
                rest = 2 * PAIRS + tl.arange(0, BLOCK_REST)[None, :]
                inside = (heads < kv_heads) & (rest < HEAD_SIZE)
                tl.store(key + rest, tl.load(row + rest, mask=inside).to(key_cache.dtype.element_ty), mask=inside)
        else:  # groups that share a scale may have elements of both halves and of the rest
            columns = tl.arange(0, BLOCK_KEY)[None, :]
            inside = (heads < kv_heads) & (columns < HEAD_SIZE)
            first = token * PAIRS
            turned = _rotated_columns(row, cos + first, sin + first, columns, inside, PAIRS, INTERLEAVED)
            store_8bit(turned, key_cache, key_scales, position, heads < kv_heads, HEAD_SIZE)
        if VALUE_SIZE > 0:
            columns = tl.arange(0, BLOCK_VALUE)[None, :]
            present = (heads < kv_heads) & (columns < VALUE_SIZE)
            addresses = v + token * v_token_stride + heads * v_head_stride + columns
            if key_scales is None:
                value = tl.load(addresses, mask=present)
                place = value_cache + position * VALUE_SIZE + columns
                tl.store(place, value.to(value_cache.dtype.element_ty), mask=present)
            else:
                value = tl.load(addresses, mask=present, other=0.0)
                store_8bit(value, value_cache, value_scales, position, heads < kv_heads, VALUE_SIZE)


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
    tokens, query_heads, head_size = q.shape
    kv_heads, pairs = k.shape[1], cos.shape[1]
    value_size = 0 if v is None else v.shape[2]
    if not pairs:
        query_heads = 0  # none that turns
    grid = (tokens, triton.cdiv(query_heads, BLOCK_HEADS) + triton.cdiv(kv_heads, BLOCK_HEADS))
    rotary_and_cache_kernel[grid](
        q,
        k,
        v,
        cos,
        sin,
        key_cache,
        value_cache,
        key_scales,
        value_scales,
        slots,
        query_heads,
        kv_heads,
        *q.stride()[:2],
        *k.stride()[:2],
        *((0, 0) if v is None else v.stride()[:2]),
        HEAD_SIZE=head_size,
        VALUE_SIZE=value_size,
        PAGE=key_cache.shape[2],
        PAIRS=pairs,
        INTERLEAVED=interleaved,
        BLOCK_HEADS=BLOCK_HEADS,
        BLOCK_PAIRS=triton.next_power_of_2(max(pairs, 1)),
        BLOCK_REST=triton.next_power_of_2(max(head_size - 2 * pairs, 1)),
        BLOCK_KEY=triton.next_power_of_2(head_size),
        BLOCK_VALUE=triton.next_power_of_2(max(value_size, 1)),
        enable_fp_fusion=True,
    )
