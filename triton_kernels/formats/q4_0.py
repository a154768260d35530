"""Q4_0: 32 weights, a half scale and 4-bit codes; weight = d * (code - 8)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements, words
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    return [blocks[..., 2:], blocks[..., :2]]


def _join(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return torch.cat([scales, codes], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    low, high = words(planes[0], row, group, groups, 4)
    scale = elements(planes[1], row, group, groups, 1, 1).to(tl.float32)
    return low, high, scale, scale


Q4_0 = Format(
    weight_format=WeightFormat.Q4_0,
    planes=(Plane(torch.int32, 16, 32), Plane(torch.float16, 2, 32)),
    split=_split,
    join=_join,
    decode=_decode,
    zero=8,
)
