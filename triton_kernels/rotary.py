"""Rotary position embedding, and the write of the new keys and values into the paged cache, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.cache_8bit import store_8bit
from trichord.triton_kernels.dependent import await_predecessor, dependent_launch

BLOCK_HEADS = 8


@triton.jit
def turned(rows, cos, sin, columns, mask, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A tile of rows (R, 1) of whole heads at these columns (1, C): each element turned by its angle with its other."""
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
    other = tl.load(rows + others, mask=mask & turning, other=0.0)
    return tl.load(rows + columns, mask=mask, other=0.0) * c + other * tl.where(is_right, s, -s)


@triton.jit
def store_fresh(
    fresh,
    v,
    token,
    heads,
    kv_heads,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Writes a token's turned keys, and its values, if any, into the caches: of heads (R, 1), where there are such.

    `fresh` and v are what `fresh_arguments` makes of them.
    """
    k, cos, sin, slots, key_strides, value_strides = fresh
    present = heads < kv_heads
    slot = tl.load(slots + token)
    position = (slot // PAGE * kv_heads + heads) * PAGE + slot % PAGE
    columns = tl.arange(0, triton.next_power_of_2(HEAD_SIZE))[None, :]
    mask = present & (columns < HEAD_SIZE)
    rows = k + token * key_strides[0] + heads * key_strides[1]
    key = turned(rows, cos + token * PAIRS, sin + token * PAIRS, columns, mask, PAIRS, INTERLEAVED)
    if key_scales is None:
        tl.store(key_cache + position * HEAD_SIZE + columns, key.to(key_cache.dtype.element_ty), mask=mask)
    else:
        store_8bit(key, key_cache, key_scales, position, present, HEAD_SIZE)
    if v is not None:
        columns = tl.arange(0, triton.next_power_of_2(VALUE_SIZE))[None, :]
        mask = present & (columns < VALUE_SIZE)
        value = tl.load(v + token * value_strides[0] + heads * value_strides[1] + columns, mask=mask, other=0.0)
        if key_scales is None:
            tl.store(value_cache + position * VALUE_SIZE + columns, value.to(value_cache.dtype.element_ty), mask=mask)
        else:
            store_8bit(value, value_cache, value_scales, position, present, VALUE_SIZE)


@triton.jit
def rotary_and_cache_kernel(
    q,
    fresh,
    v,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    query_heads,
    kv_heads,
    q_token_stride,
    q_head_stride,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a token and BLOCK_HEADS heads: first the tiles of query heads, then those of key-value heads."""
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    query_tiles = tl.cdiv(query_heads, BLOCK_HEADS)
    await_predecessor(PDL)
    if tile < query_tiles:
        pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
        left = 2 * pairs if INTERLEAVED else pairs
        right = left + 1 if INTERLEAVED else left + PAIRS
        c = tl.load(fresh[1] + token * PAIRS + pairs, mask=pairs < PAIRS, other=0.0)
        s = tl.load(fresh[2] + token * PAIRS + pairs, mask=pairs < PAIRS, other=0.0)
        heads = tile * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
        mask = (heads < query_heads) & (pairs < PAIRS)
        row = q + token * q_token_stride + heads * q_head_stride
        a = tl.load(row + left, mask=mask, other=0.0)
        b = tl.load(row + right, mask=mask, other=0.0)
        tl.store(row + left, a * c - b * s, mask=mask)
        tl.store(row + right, a * s + b * c, mask=mask)
    else:
        heads = (tile - query_tiles) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
        store_fresh(
            fresh, v, token, heads, kv_heads, key_cache, value_cache, key_scales, value_scales,
            HEAD_SIZE, VALUE_SIZE, PAGE, PAIRS, INTERLEAVED,
        )  # fmt: skip


def fresh_arguments(
    k: torch.Tensor, v: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, slots: torch.Tensor
) -> tuple[tuple[object, ...], torch.Tensor | None]:
    """New keys (T, G, D) and values (T, G, Dv), their angles (T, R/2) and slots (T,), as kernels take them.

    The values stand apart, for they may be None, which Triton 3.6 does not take within a tuple.
    """
    return (k, cos, sin, slots, k.stride()[:2], (0, 0) if v is None else v.stride()[:2]), v


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
    if not pairs:
        query_heads = 0  # none that turns
    grid = (tokens, triton.cdiv(query_heads, BLOCK_HEADS) + triton.cdiv(kv_heads, BLOCK_HEADS))
    rotary_and_cache_kernel[grid](
        q,
        *fresh_arguments(k, v, cos, sin, slots),
        key_cache,
        value_cache,
        key_scales,
        value_scales,
        query_heads,
        kv_heads,
        *q.stride()[:2],
        HEAD_SIZE=head_size,
        VALUE_SIZE=0 if v is None else v.shape[2],
        PAGE=key_cache.shape[2],
        PAIRS=pairs,
        INTERLEAVED=interleaved,
        BLOCK_HEADS=BLOCK_HEADS,
        BLOCK_PAIRS=triton.next_power_of_2(max(pairs, 1)),
        enable_fp_fusion=True,
        **dependent_launch(),
    )
