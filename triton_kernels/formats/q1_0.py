"""Q1_0: 128 weights, a half scale and 1-bit codes in order; weight = d * (2 * code - 1)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements, merge, spread, words
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    codes = spread(blocks[..., 2:, None], 1).unflatten(-2, (4, 4)).flatten(-2)
    return [merge(codes, 1), blocks[..., :2]]


def _join(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    codes = spread(codes.unflatten(-1, (4, 4)), 1).unflatten(-1, (4, 8))
    return torch.cat([scales, merge(codes, 1).flatten(-3)], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    low, high = words(planes[0], row, group, groups, 1, 1)  # twice the code
    scale = elements(planes[1], row, group, groups, 4, 1).to(tl.float32)
    return low, high, scale, scale


Q1_0 = Format(
    weight_format=WeightFormat.Q1_0,
    planes=(Plane(torch.int32, 4, 32), Plane(torch.float16, 2, 128)),
    split=_split,
    join=_join,
    decode=_decode,
    zero=1,
)
