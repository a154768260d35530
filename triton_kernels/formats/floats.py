"""F32, F16, BF16 and F64: plain numbers, one plane as it lies in the file.

A group is 16 bytes, what a thread loads at once. Rows of another length are padded with zeros to whole groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.format import Format, Plane
from trichord.weight_format import WeightFormat


@triton.jit
def _decode(planes, row, group, columns, SIZE: tl.constexpr):
    stride = tl.cdiv(columns, SIZE) * SIZE
    offset = (group * SIZE)[None, :, None] + tl.arange(0, SIZE)[None, None, :]
    return tl.load(planes[0] + (row * stride)[:, None, None] + offset)


@triton.jit
def _decode_groups_of_2(planes, row, group, columns):
    return _decode(planes, row, group, columns, 2).to(tl.float32)


@triton.jit
def _decode_groups_of_4(planes, row, group, columns):
    return _decode(planes, row, group, columns, 4)


@triton.jit
def _decode_groups_of_8(planes, row, group, columns):
    return _decode(planes, row, group, columns, 8)


def _floats(weight_format: WeightFormat, dtype: torch.dtype, decode: triton.runtime.KernelInterface) -> Format:
    return Format(
        weight_format=weight_format,
        planes=(Plane(dtype, dtype.itemsize, 1),),
        split=lambda blocks: [blocks],
        join=lambda numbers: numbers,
        decode=decode,
        integer=False,
        group_size=16 // dtype.itemsize,
    )


F32 = _floats(WeightFormat.F32, torch.float32, _decode_groups_of_4)
F16 = _floats(WeightFormat.F16, torch.float16, _decode_groups_of_8)
BF16 = _floats(WeightFormat.BF16, torch.bfloat16, _decode_groups_of_8)
F64 = _floats(WeightFormat.F64, torch.float64, _decode_groups_of_2)
