"""Q4_1: 32 weights, a half scale, a half minimum and 4-bit codes; weight = d * code + m."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements, words
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    return [blocks[..., 4:], blocks[..., :4]]


def _join(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return torch.cat([scales, codes], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    low, high = words(planes[0], row, group, groups, 4)
    scale, offset = tl.split(elements(planes[1], row, group, groups, 1, 2).to(tl.float32))
    return low, high, scale[:, :, None], -offset[:, :, None]


Q4_1 = Format(
    weight_format=WeightFormat.Q4_1,
    planes=(Plane(torch.int32, 16, 32), Plane(torch.float16, 4, 32)),
    split=_split,
    join=_join,
    decode=_decode,
    has_minimum=True,
)
