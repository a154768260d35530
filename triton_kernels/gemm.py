"""Products with many rows of activations, tile by tile on tensor cores, each weight decoded once a tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.activations import Activations
from trichord.triton_kernels.experts import Pairs
from trichord.triton_kernels.formats import FORMATS
from trichord.triton_kernels.launch import launches, processors
from trichord.triton_kernels.primitives import half_dot
from trichord.triton_kernels.tile import decode_tile, fragment_order
from trichord.weight_format import Weight


@triton.jit
def _place(number, token_tiles, row_tiles, GROUP: tl.constexpr):
    """Which tile of tokens and which tile of rows come at `number`.

    GROUP tiles of tokens pass by all rows together, so that programs which run at a time share what they read of the
    weight and what they read of x.
    """
    first = number // (GROUP * row_tiles) * GROUP
    within = number % (GROUP * row_tiles)
    width = tl.minimum(token_tiles - first, GROUP)
    return first + within % width, within // width


@triton.jit
def _products(
    planes,
    x,
    row,
    columns,
    stride,
    FORMAT: tl.constexpr,
    EXACT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Rows `row` (R,) of the weight times the rows of x that the pointers (1, BLOCK_TOKENS) begin -> float32."""
    SIZE: tl.constexpr = FORMAT.group_size
    groups = tl.cdiv(columns, SIZE)
    column = tl.arange(0, BLOCK_COLUMNS)
    # Were there a way around the loop, the tensor cores would wait for each instruction of theirs before the next.
    tl.assume(columns > 0)
    accumulator = tl.zeros((row.shape[0], BLOCK_TOKENS), tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        group = start // SIZE + tl.arange(0, BLOCK_COLUMNS // SIZE)
        if WHOLE:
            weights = decode_tile(planes, row, group, columns, FORMAT, not EXACT)
            values = tl.load(x + (start + column)[:, None])
        else:
            weights = decode_tile(planes, row, tl.minimum(group, groups - 1), columns, FORMAT, not EXACT)
            weights = tl.where((group < groups)[None, :, None], weights, 0.0)
            values = tl.load(x + (start + column)[:, None], mask=(start + column < stride)[:, None], other=0.0)
        weights = tl.reshape(weights, (row.shape[0], BLOCK_COLUMNS))
        if EXACT:
            product = tl.dot(weights, values, input_precision="ieee")
            # Not `+=`, which Triton folds into the dot: one running sum over all columns would round more.
            accumulator = tl.fma(product, 1.0, accumulator)
        else:
            accumulator = half_dot(fragment_order(weights), values, accumulator)
    return accumulator


@triton.jit
def gemm_kernel(
    planes,
    x,
    scales,
    y,
    scale,
    bias,
    order,
    tiles,
    token_tiles,
    rows,
    columns,
    tokens,
    stride,
    FORMAT: tl.constexpr,
    SHARING: tl.constexpr,
    EXACT: tl.constexpr,
    WHOLE: tl.constexpr,
    PERSISTENT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """y (tokens, rows) = x (tokens, stride) times the transposed weight times scale + bias, tile by tile.

    The weights are the first operand, so that they go from the registers where they were decoded into the product.
    EXACT multiplies float32 x in float32; otherwise x is float16 in fragment order and each of its rows has a scale.
    WHOLE says that BLOCK_COLUMNS divides the columns. Rows and tokens past the end read the last one instead.
    With SHARING, y (pairs, rows) is a row of x times the matrix of its expert for each pair; SHARING adjacent pairs
    share the row. `order` holds the pairs by expert and `tiles` which of them a tile covers: see `experts.sort_kernel`.
    There is a program for every tile, in the order of `_place`; if PERSISTENT there are fewer, and each takes several.
    """
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    first_tile = tl.program_id(0)
    end, step = first_tile + 1, 1
    if PERSISTENT:
        end, step = token_tiles * row_tiles, tl.num_programs(0)
    for number in range(first_tile, end, step):
        token_tile, row_tile = _place(number, token_tiles, row_tiles, GROUP)
        index = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        row = tl.minimum(index, rows - 1).to(tl.int64)
        first, after = token_tile * BLOCK_TOKENS, tokens
        if SHARING:
            tile = tiles + token_tile * 3
            row += tl.load(tile).to(tl.int64) * rows
            first, after = tl.load(tile + 1), tl.load(tile + 2)
        if not SHARING or first < after:
            result = first + tl.arange(0, BLOCK_TOKENS)
            valid = result < after
            token = tl.minimum(result, after - 1)
            if SHARING:
                result = tl.load(order + token)
                token = result // SHARING
            start = x + (token.to(tl.int64) * stride)[None, :]
            y_tile = _products(planes, start, row, columns, stride, FORMAT, EXACT, WHOLE, BLOCK_TOKENS, BLOCK_COLUMNS)
            if not EXACT:
                y_tile *= tl.load(scales + token)[None, :]
            y_tile *= scale
            if bias is not None:
                y_tile += tl.load(bias + row)[:, None]
            target = y + (result.to(tl.int64) * rows)[None, :] + index[:, None]
            tl.store(target, y_tile, mask=valid[None, :] & (index < rows)[:, None])


def gemm(
    activations: Activations, weight: Weight, bias: torch.Tensor | None, exact: bool, pairs: Pairs | None = None
) -> torch.Tensor:
    """x (T, K) times the transposed weight (N, K) and its scale + bias -> (T, N) float32.

    It is multiplied in float32 or from float16 operands. With `pairs`, each of them is a row of x times the matrix of
    its expert in a weight (X, N, K), without the scale -> (pairs, N).
    """
    format, rows, columns = FORMATS[weight.format], weight.out_features, activations.columns
    if pairs is None:
        tile = launches().gemm_tile(activations.tokens, exact, rows, weight.format.name)
        results, token_tiles = activations.tokens, triton.cdiv(activations.tokens, tile.tokens)
        order = table = None
    else:
        tile = launches().gemm_tile(pairs.of_an_expert, exact, rows, weight.format.name)
        order, table = pairs.tiles(tile.tokens)
        results, token_tiles = pairs.count, len(table)
    y = activations.x.new_empty((results, rows))
    x, scales = (activations.x, activations.x) if exact else activations.halves
    tiles = token_tiles * triton.cdiv(rows, tile.rows)
    programs = min(tiles, tile.programs * processors()) or tiles
    gemm_kernel[(programs,)](
        format.arguments(weight.data, weight.rows, columns),
        x,
        scales,
        y,
        float(weight.scale) if pairs is None else 1.0,
        bias,
        order,
        table,
        token_tiles,
        rows,
        columns,
        activations.tokens,
        x.shape[-1],
        FORMAT=format,
        SHARING=0 if pairs is None else pairs.sharing,
        EXACT=exact,
        WHOLE=columns % tile.columns == 0,
        PERSISTENT=programs < tiles,
        GROUP=tile.group,
        BLOCK_ROWS=tile.rows,
        BLOCK_TOKENS=tile.tokens,
        BLOCK_COLUMNS=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    return y
