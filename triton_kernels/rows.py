"""Rows of a weight as float32: all of them, or those that token ids choose."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats import FORMATS
from trichord.triton_kernels.launch import launches
from trichord.triton_kernels.tile import decode_tile
from trichord.weight_format import Weight


@triton.jit
def rows_kernel(
    planes,
    ids,
    output,
    count,
    columns,
    FORMAT: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """output (count, columns) float32 = rows `ids` (count,) int64 of the weight, or its rows in order."""
    SIZE: tl.constexpr = FORMAT.group_size
    index = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.minimum(index, count - 1)
    if GATHER:
        row = tl.load(ids + row)
    start = tl.program_id(1) * BLOCK_COLUMNS
    group = tl.minimum(start // SIZE + tl.arange(0, BLOCK_COLUMNS // SIZE), tl.cdiv(columns, SIZE) - 1)
    weights = decode_tile(planes, row, group, columns, FORMAT, False)
    column = start + tl.arange(0, BLOCK_COLUMNS)[None, :]
    mask = (index < count)[:, None] & (column < columns)
    tl.store(output + (index * columns)[:, None] + column, tl.reshape(weights, (BLOCK_ROWS, BLOCK_COLUMNS)), mask=mask)


def _rows(weight: Weight, ids: torch.Tensor | None, count: int) -> torch.Tensor:
    columns, format = weight.in_features, FORMATS[weight.format]
    planes = format.arguments(weight.data, weight.rows, columns)
    output = torch.empty((count, columns), dtype=torch.float32, device=weight.device)
    tile = launches().weights
    rows_kernel[(triton.cdiv(count, tile.rows), triton.cdiv(columns, tile.columns))](
        planes,
        ids,
        output,
        count,
        columns,
        FORMAT=format,
        GATHER=ids is not None,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        num_warps=tile.warps,
        enable_fp_fusion=False,  # a fused multiply-add would round otherwise than GGML's dequantization
    )
    return output


def dequantize(weight: Weight) -> torch.Tensor:
    """The whole weight as float32 of `weight.shape` (without `weight.scale`)."""
    return _rows(weight, None, weight.rows).view(weight.shape)


def embedding(ids: torch.Tensor, weight: Weight) -> torch.Tensor:
    """ids (T,) int64 -> their rows of the weight (T, K) float32. The ids must lie within the weight."""
    return _rows(weight, ids.contiguous(), ids.shape[0])
