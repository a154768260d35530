"""Q8_0: 32 weights, a half scale and signed bytes; weight = d * byte."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    return [blocks[..., 2:18], blocks[..., 18:], blocks[..., :2]]


def _join(low: torch.Tensor, high: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return torch.cat([scales, low, high], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    low = elements(planes[0], row, group, groups, 1, 4)
    high = elements(planes[1], row, group, groups, 1, 4)
    scale = elements(planes[2], row, group, groups, 1, 1).to(tl.float32)
    return low, high, scale, scale


Q8_0 = Format(
    weight_format=WeightFormat.Q8_0,
    planes=(Plane(torch.int32, 16, 32), Plane(torch.int32, 16, 32), Plane(torch.float16, 2, 32)),
    split=_split,
    join=_join,
    decode=_decode,
)
