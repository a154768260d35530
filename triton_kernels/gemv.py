"""Products with few rows of activations: the weights stream past once, and the time is that of reading them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.activations import Activations
from trichord.triton_kernels.experts import Pairs
from trichord.triton_kernels.formats import FORMATS
from trichord.triton_kernels.launch import launches
from trichord.triton_kernels.primitives import dot4
from trichord.weight_format import Weight


@triton.jit
def _integer_products(planes, activations, row, group, token, columns, FORMAT: tl.constexpr, LIMBS: tl.constexpr):
    """Products of each group by integer arithmetic -> (T, R, G) float32."""
    limbs, scales, sums = activations
    groups = columns // 32
    low, high, scale, minimum = FORMAT.decode(planes, row, group, columns)
    x_group = (token * groups)[:, None] + group[None, :]
    word = (x_group * (8 * LIMBS))[:, None, :, None] + tl.arange(0, 4)[None, None, None, :]
    product = 0
    for limb in tl.static_range(LIMBS):
        x_low = tl.load(limbs + limb * 8 + word)
        x_high = tl.load(limbs + limb * 8 + 4 + word)
        low_words = dot4(low[None], x_low, 0)
        if FORMAT.scale_group == 16:
            sums_of_limb = tl.join(tl.sum(low_words, axis=3), tl.sum(dot4(high[None], x_high, 0), axis=3))
        else:
            sums_of_limb = tl.sum(dot4(high[None], x_high, low_words), axis=3, keep_dims=True)
        product = product * 256 + sums_of_limb
    half = (x_group * 2)[:, None, :, None] + tl.arange(0, 2)[None, None, None, :]
    x_sum = tl.load(sums + half)
    if FORMAT.scale_group == 32:
        x_sum = tl.sum(x_sum, axis=3, keep_dims=True)
    result = (product - FORMAT.zero * x_sum).to(tl.float32) * scale[None]
    if FORMAT.has_minimum:
        result -= x_sum.to(tl.float32) * minimum[None]
    return tl.sum(result, axis=3) * tl.load(scales + x_group)[:, None, :]


@triton.jit
def _float_products(planes, x, row, group, token, columns, FORMAT: tl.constexpr):
    """Products of each group of a float format, in float32 -> (T, R, G)."""
    weights = FORMAT.decode(planes, row, group, columns)
    column = (group * FORMAT.group_size)[None, None, :, None] + tl.arange(0, FORMAT.group_size)[None, None, None, :]
    values = tl.load(x + (token * columns)[:, None, None, None] + column, mask=column < columns, other=0.0)
    return tl.sum(weights[None] * values, axis=3)


@triton.jit
def gemv_kernel(
    planes,
    activations,
    y,
    experts,
    rows,
    columns,
    tokens,
    FORMAT: tl.constexpr,
    LIMBS: tl.constexpr,
    SHARING: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """y (tokens, rows) = x times the transposed weight, BLOCK_ROWS rows of the weight a program.

    `activations` are the limbs, scales and sums of x for an integer format, x itself for a float format. Indices past
    the end read the last element instead, and what they give is dropped. With SHARING, y (pairs, rows) is a row of x
    times the matrix of its expert for each of `experts` (pairs,): SHARING adjacent pairs share the row, tokens is 1.
    """
    groups = tl.cdiv(columns, FORMAT.group_size)
    index = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.minimum(index, rows - 1).to(tl.int64)
    token = tl.minimum(tl.arange(0, TOKENS), tokens - 1)
    if SHARING:
        pair = tl.program_id(1)
        row += tl.load(experts + pair).to(tl.int64) * rows
        token += pair // SHARING
        y += pair.to(tl.int64) * rows
    accumulator = tl.zeros((TOKENS, BLOCK_ROWS, BLOCK_GROUPS), tl.float32)
    for start in range(0, groups, BLOCK_GROUPS):
        group = start + tl.arange(0, BLOCK_GROUPS)
        inside = tl.minimum(group, groups - 1)
        if FORMAT.integer:
            products = _integer_products(planes, activations, row, inside, token, columns, FORMAT, LIMBS)
        else:
            products = _float_products(planes, activations[0], row, inside, token, columns, FORMAT)
        accumulator += tl.where((group < groups)[None, None, :], products, 0.0)
    token = tl.arange(0, TOKENS)[:, None]
    target = y + token.to(tl.int64) * rows + index[None, :]
    tl.store(target, tl.sum(accumulator, axis=2), mask=(token < tokens) & (index < rows)[None, :])


def gemv(activations: Activations, weight: Weight, limbs: int, pairs: Pairs | None = None) -> torch.Tensor:
    """At most FEW_ROWS rows of x (T, K) times the transposed weight (N, K) -> (T, N) float32.

    With `pairs`, each of them is a row of x times the matrix of its expert in a weight (X, N, K) -> (pairs, N). An
    integer format multiplies by `limbs` limbs of activations (see `activations.limb_kernel`), a float format by x.
    """
    format, rows, columns = FORMATS[weight.format], weight.out_features, activations.columns
    tokens, products = (activations.tokens, 1) if pairs is None else (1, pairs.count)
    y = activations.x.new_empty((tokens * products, rows))
    padded = triton.next_power_of_2(tokens)
    tile = launches().gemv_tile(padded, format.groups(columns), rows, weight.format.name)
    gemv_kernel[(triton.cdiv(rows, tile.rows), products)](
        format.arguments(weight.data, weight.rows, columns),
        activations.limbs(limbs) if format.integer else (activations.x,),
        y,
        None if pairs is None else pairs.experts,
        rows,
        columns,
        tokens,
        FORMAT=format,
        LIMBS=limbs,
        SHARING=0 if pairs is None else pairs.sharing,
        TOKENS=padded,
        BLOCK_ROWS=tile.rows,
        BLOCK_GROUPS=tile.groups,
        num_warps=tile.warps,
        num_stages=1,
        enable_fp_fusion=True,
    )
    return y
