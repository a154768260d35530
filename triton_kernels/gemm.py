"""Products with many rows of activations, tile by tile on tensor cores, each weight decoded once a tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.activations import Activations
from trichord.triton_kernels.formats import Format
from trichord.triton_kernels.launch import launches
from trichord.triton_kernels.primitives import half_dot
from trichord.triton_kernels.tile import decode_tile, fragment_order


@triton.jit
def gemm_kernel(
    planes,
    x,
    scales,
    y,
    rows,
    columns,
    tokens,
    stride,
    FORMAT: tl.constexpr,
    EXACT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """y (tokens, rows) = x (tokens, stride) times the transposed weight, one tile a program.

    The weights are the first operand, so that they go from the registers where they were decoded into the product.
    EXACT multiplies float32 x in float32; otherwise x is float16 in fragment order and each of its rows has a scale.
    WHOLE says that BLOCK_COLUMNS divides the columns. Rows and tokens past the end read the last one instead.
    """
    SIZE: tl.constexpr = FORMAT.group_size
    groups = tl.cdiv(columns, SIZE)
    index = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.minimum(index, rows - 1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    x += (tl.minimum(token, tokens - 1).to(tl.int64) * stride)[None, :]
    column = tl.arange(0, BLOCK_COLUMNS)
    accumulator = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        group = start // SIZE + tl.arange(0, BLOCK_COLUMNS // SIZE)
        if WHOLE:
            weights = decode_tile(planes, row, group, columns, FORMAT)
            values = tl.load(x + (start + column)[:, None])
        else:
            weights = decode_tile(planes, row, tl.minimum(group, groups - 1), columns, FORMAT)
            weights = tl.where((group < groups)[None, :, None], weights, 0.0)
            values = tl.load(x + (start + column)[:, None], mask=(start + column < stride)[:, None], other=0.0)
        weights = tl.reshape(weights, (BLOCK_ROWS, BLOCK_COLUMNS))
        if EXACT:
            product = tl.dot(weights, values, input_precision="ieee")
            # Not `+=`, which Triton folds into the dot: one running sum over all columns would round more.
            accumulator = tl.fma(product, 1.0, accumulator)
        else:
            accumulator = half_dot(fragment_order(weights.to(tl.float16)), values, accumulator)
    if not EXACT:
        accumulator *= tl.load(scales + token, mask=token < tokens, other=0.0)[None, :]
    target = y + (token.to(tl.int64) * rows)[None, :] + index[:, None]
    tl.store(target, accumulator, mask=(token < tokens)[None, :] & (index < rows)[:, None])


def gemm(activations: Activations, format: Format, data: torch.Tensor, rows: int, exact: bool) -> torch.Tensor:
    """x (T, K) times the transposed weight (rows, K) -> (T, rows) float32, in float32 or from float16 operands."""
    tokens, columns = activations.tokens, activations.columns
    y = activations.x.new_empty((tokens, rows))
    tile = launches().gemm_tile(tokens, exact)
    x, scales = (activations.x, activations.x) if exact else activations.halves
    gemm_kernel[(triton.cdiv(tokens, tile.tokens), triton.cdiv(rows, tile.rows))](
        format.arguments(data, rows, columns),
        x,
        scales,
        y,
        rows,
        columns,
        tokens,
        x.shape[1],
        FORMAT=format,
        EXACT=exact,
        WHOLE=columns % tile.columns == 0,
        BLOCK_ROWS=tile.rows,
        BLOCK_TOKENS=tile.tokens,
        BLOCK_COLUMNS=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    return y
