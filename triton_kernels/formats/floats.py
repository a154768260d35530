"""F32, F16, BF16 and F64: plain numbers, one plane as it lies in the file.

A group is 4 weights, as many float32 activations as a thread loads at once. Rows of another length are padded with
zeros to whole groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.weight_format import WeightFormat


@triton.jit
def _decode(planes, row, group, columns):
    return elements(planes[0], row, group, tl.cdiv(columns, 4), 1, 4).to(tl.float32)


def _floats(weight_format: WeightFormat, dtype: torch.dtype) -> Format:
    return Format(
        weight_format=weight_format,
        planes=(Plane(dtype, dtype.itemsize, 1),),
        split=lambda blocks: [blocks],
        join=lambda numbers: numbers,
        decode=_decode,
        integer=False,
        group_size=4,
    )


F32 = _floats(WeightFormat.F32, torch.float32)
F16 = _floats(WeightFormat.F16, torch.float16)
BF16 = _floats(WeightFormat.BF16, torch.bfloat16)
F64 = _floats(WeightFormat.F64, torch.float64)
