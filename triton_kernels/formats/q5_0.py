"""Q5_0: 32 weights, a half scale, high bits in order and low nibbles; weight = d * (code - 16)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements, merge, spread, words
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    high = spread(blocks[..., 2:6, None], 1).flatten(-2)
    return [blocks[..., 6:], merge(high, 1), blocks[..., :2]]


def _join(low: torch.Tensor, high: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    high = merge(spread(high, 1).unflatten(-1, (4, 8)), 1).flatten(-2)
    return torch.cat([scales, high, low], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    low, high = words(planes[0], row, group, groups, 4)
    low_bit, high_bit = words(planes[1], row, group, groups, 1, 4)
    scale = elements(planes[2], row, group, groups, 1, 1).to(tl.float32)
    return low | low_bit, high | high_bit, scale, scale


Q5_0 = Format(
    weight_format=WeightFormat.Q5_0,
    planes=(Plane(torch.int32, 16, 32), Plane(torch.int32, 4, 32), Plane(torch.float16, 2, 32)),
    split=_split,
    join=_join,
    decode=_decode,
    zero=16,
)
