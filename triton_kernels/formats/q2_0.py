"""Q2_0: 64 weights, a half scale and 2-bit codes in order; weight = d * (code - 1)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements, merge, spread, words
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    codes = spread(blocks[..., 2:, None], 2).unflatten(-2, (2, 8)).flatten(-2)
    return [merge(codes, 2), blocks[..., :2]]


def _join(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    codes = spread(codes.unflatten(-1, (2, 8)), 2).unflatten(-1, (8, 4))
    return torch.cat([scales, merge(codes, 2).flatten(-3)], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    low, high = words(planes[0], row, group, groups, 2)
    scale = elements(planes[1], row, group, groups, 2, 1).to(tl.float32)
    return low, high, scale, scale


Q2_0 = Format(
    weight_format=WeightFormat.Q2_0,
    planes=(Plane(torch.int32, 8, 32), Plane(torch.float16, 2, 64)),
    split=_split,
    join=_join,
    decode=_decode,
    zero=1,
)
