"""Rows of a weight as floats: all of them, or those that token ids choose."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats import FORMATS
from trichord.triton_kernels.launch import launches
from trichord.triton_kernels.tile import decode_tile, fragment_order
from trichord.weight_format import Weight


@triton.jit
def rows_kernel(
    planes,
    ids,
    output,
    first,
    count,
    columns,
    stride,
    FORMAT: tl.constexpr,
    GATHER: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """output (count, stride) = rows `ids` (count,) int64 of the weight, or `count` rows from row `first` on.

    It is float32 or, with HALF, float16 in fragment order and zero from `columns` to stride.
    """
    SIZE: tl.constexpr = FORMAT.group_size
    index = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.minimum(index, count - 1)
    row = tl.load(ids + row) if GATHER else row + first
    start = tl.program_id(1) * BLOCK_COLUMNS
    group = tl.minimum(start // SIZE + tl.arange(0, BLOCK_COLUMNS // SIZE), tl.cdiv(columns, SIZE) - 1)
    weights = tl.reshape(decode_tile(planes, row, group, columns, FORMAT, HALF), (BLOCK_ROWS, BLOCK_COLUMNS))
    column = start + tl.arange(0, BLOCK_COLUMNS)[None, :]
    if HALF:
        weights = fragment_order(tl.where(column < columns, weights, 0.0))
    tl.store(output + (index * stride)[:, None] + column, weights, mask=(index < count)[:, None] & (column < stride))


def _rows(weight: Weight, ids: torch.Tensor | None, first: int, output: torch.Tensor) -> torch.Tensor:
    """Fills `output` (count, stride), float32 or float16: see `rows_kernel`."""
    columns, format = weight.in_features, FORMATS[weight.format]
    (count, stride), tile = output.shape, launches().weights
    rows_kernel[(triton.cdiv(count, tile.rows), triton.cdiv(stride, tile.columns))](
        format.arguments(weight.data, weight.rows, columns),
        ids,
        output,
        first,
        count,
        columns,
        stride,
        FORMAT=format,
        GATHER=ids is not None,
        HALF=output.dtype == torch.float16,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        num_warps=tile.warps,
        enable_fp_fusion=False,  # a fused multiply-add would round otherwise than GGML's dequantization
    )
    return output


def _floats(weight: Weight, count: int) -> torch.Tensor:
    return torch.empty((count, weight.in_features), dtype=torch.float32, device=weight.device)


def dequantize(weight: Weight) -> torch.Tensor:
    """The whole weight as float32 of `weight.shape` (without `weight.scale`)."""
    return _rows(weight, None, 0, _floats(weight, weight.rows)).view(weight.shape)


def embedding(ids: torch.Tensor, weight: Weight) -> torch.Tensor:
    """ids (T,) int64 -> their rows of the weight (T, K) float32. The ids must lie within the weight."""
    return _rows(weight, ids.contiguous(), 0, _floats(weight, ids.shape[0]))


def half_rows(weight: Weight, first: int, output: torch.Tensor) -> torch.Tensor:
    """`output` (count, K rounded up to 16) float16 -> the same, now the weight's rows from row `first` on.

    They are the operands of the products of many rows (see `tile.decode_tile` and `fragment_order`), whose other
    operands are `Activations.halves`. `weight.scale` is left out.
    """
    return _rows(weight, None, first, output)
