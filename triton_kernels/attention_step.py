"""One step of flash attention: a tile of queries meets a block of keys and values of one page."""

from __future__ import annotations

import triton
import triton.language as tl

from trichord.triton_kernels.cache_8bit import dequantized
from trichord.triton_kernels.primitives import half_dot


@triton.jit
def _dot(a, b, accumulator, EXACT: tl.constexpr):
    """accumulator + a @ b, of float32 operands when EXACT, else of float16."""
    if EXACT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return half_dot(a.to(tl.float16), b.to(tl.float16), accumulator)


@triton.jit
def load_rows(rows, inside, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr = True):
    """Elements FIRST to FIRST + COUNT of the rows at these pointers, as a tile (rows, BLOCK).

    Zeros beyond COUNT, and, when MASKED, in the rows that are not `inside`.
    """
    columns = tl.arange(0, BLOCK)
    addresses = rows[:, None] + (FIRST + columns)[None, :]
    if MASKED and COUNT < BLOCK:
        return tl.load(addresses, mask=inside[:, None] & (columns < COUNT)[None, :], other=0.0)
    elif MASKED:
        return tl.load(addresses, mask=inside[:, None], other=0.0)
    elif COUNT < BLOCK:
        return tl.load(addresses, mask=(columns < COUNT)[None, :], other=0.0)
    else:
        return tl.load(addresses)


@triton.jit
def _load_cached(
    rows,
    scales,
    inside,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """`load_rows` of a cache, times their scales where these are not None."""
    return dequantized(
        load_rows(rows, inside, FIRST, COUNT, BLOCK, MASKED), scales, inside, FIRST, COUNT, EXACT, MASKED
    )


@triton.jit
def first_seen(positions, WINDOW: tl.constexpr, CHUNKED: tl.constexpr):
    """The first position that a query at each of these positions sees."""
    if WINDOW == 0:
        return positions * 0
    elif CHUNKED:
        return positions // WINDOW * WINDOW
    else:
        return tl.maximum(positions - (WINDOW - 1), 0)


@triton.jit
def _tanh(x):
    """tanh(x) in float32: the polynomial of Cephes' tanhf near zero, where the exponential would cancel."""
    magnitude = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(magnitude * 2.8853900817779268) + 1.0)  # exp(2x) = exp2(2x log2(e))
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    return tl.where(magnitude < 0.625, near * square * x + x, tl.where(x < 0, -far, far))


@triton.jit
def step(
    start,
    queries,
    factors,
    query_positions,
    slopes,
    soft_cap,
    largest,
    total,
    mean,
    keys,
    values,
    key_scales,
    value_scales,
    page_table,
    page_rows,
    lowest,
    length,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    EXACT: tl.constexpr,
    LATENT: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr,
    CAPPED: tl.constexpr,
    SLOPED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Attends to BLOCK_KEYS positions of one page, from `start`; returns the new (largest, total, mean).

    EXACT: queries are (pointers to the rows, which of them count); they and the keys are multiplied BLOCK_HEAD elements
    at a time. Else they are two pieces of the rows: BLOCK_HEAD elements from FIRST on, and, where BLOCK_REST is not 0,
    the rest of the head, which lies before or behind these. LATENT: the first piece of a key is its value.
    Scores times `factors` are exponents of 2, in which soft_cap and slopes are; CAPPED: the factors are over soft_cap.
    key_scales and value_scales are those of caches of 8 bits, else None.
    """
    offsets = tl.arange(0, BLOCK_KEYS)
    positions = start + offsets
    page = tl.load(page_table + start // PAGE).to(tl.int64)
    rows = page * page_rows + start % PAGE + offsets
    key_rows = keys + rows * HEAD_SIZE
    key_scale_rows = key_scales
    value_scale_rows = value_scales
    if key_scales is not None:
        key_scale_rows = key_scales + rows * ((HEAD_SIZE + 31) // 32)
        value_scale_rows = value_scales + rows * ((VALUE_SIZE + 31) // 32)
    inside = positions < length
    if WINDOW > 0:
        inside &= positions >= lowest
    scores = tl.zeros([query_positions.shape[0], BLOCK_KEYS], tl.float32)
    if EXACT:
        for column in range(0, HEAD_SIZE, BLOCK_HEAD):
            columns = column + tl.arange(0, BLOCK_HEAD)
            mask = queries[1][:, None] & (columns < HEAD_SIZE)[None, :]
            query = tl.load(queries[0][:, None] + columns[None, :], mask=mask, other=0.0)
            mask = inside[:, None] & (columns < HEAD_SIZE)[None, :]
            key = tl.load(key_rows[:, None] + columns[None, :], mask=mask, other=0.0)
            key = dequantized(key, key_scale_rows, inside, column, HEAD_SIZE - column, EXACT, True)
            scores = _dot(query, tl.trans(key), scores, EXACT)
    else:
        key = _load_cached(
            key_rows, key_scale_rows, inside, FIRST, min(HEAD_SIZE, BLOCK_HEAD), BLOCK_HEAD, EXACT, MASKED
        )
        scores = _dot(queries[0], tl.trans(key), scores, EXACT)
        if BLOCK_REST > 0:
            before: tl.constexpr = 0 if FIRST > 0 else BLOCK_HEAD
            rest = _load_cached(
                key_rows, key_scale_rows, inside, before, HEAD_SIZE - BLOCK_HEAD, BLOCK_REST, EXACT, MASKED
            )
            scores = _dot(queries[1], tl.trans(rest), scores, EXACT)
    if CAPPED or SLOPED:
        scores *= factors[:, None]
        if CAPPED:
            scores = soft_cap * _tanh(scores)
        if SLOPED:
            scores += slopes[:, None] * (positions[None, :] - query_positions[:, None])
        factors = tl.full(factors.shape, 1.0, tl.float32)
    if MASKED:
        seen = inside[None, :]
        if CAUSAL:
            seen &= positions[None, :] <= query_positions[:, None]
        if WINDOW > 0:
            seen &= positions[None, :] >= first_seen(query_positions, WINDOW, CHUNKED)[:, None]
        scores = tl.where(seen, scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, axis=1) * factors)
    weights = tl.exp2(scores * factors[:, None] - new_largest[:, None])
    decay = tl.exp2(largest - new_largest)
    if LATENT:
        value = key
    else:
        value = _load_cached(
            values + rows * VALUE_STRIDE, value_scale_rows, inside, 0, VALUE_SIZE, BLOCK_VALUE, EXACT, MASKED
        )
    mean = _dot(weights, value, mean * decay[:, None], EXACT)
    return new_largest, total * decay + tl.sum(weights, axis=1), mean
