"""Q8_K: 256 weights, signed bytes and a float32 scale; weight = d * byte.

A block ends with the sums of each 16 bytes as 16-bit integers. They help integer products with formats that have a
minimum, and nothing needs them here: the planes leave them out and `unpack` computes them again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    groups = blocks[..., 4:260].unflatten(-1, (8, 2, 16))
    return [groups[..., 0, :], groups[..., 1, :], blocks[..., :4]]


def _join(low: torch.Tensor, high: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    weights = torch.stack([low.unflatten(-1, (8, 16)), high.unflatten(-1, (8, 16))], dim=-2)
    sums = weights.view(torch.int8).sum(-1, dtype=torch.int16).flatten(-2).contiguous().view(torch.uint8)
    return torch.cat([scales, weights.flatten(-3), sums], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    low = elements(planes[0], row, group, groups, 1, 4)
    high = elements(planes[1], row, group, groups, 1, 4)
    scale = elements(planes[2], row, group, groups, 8, 1).to(tl.float32)
    return low, high, scale, scale


Q8_K = Format(
    weight_format=WeightFormat.Q8_K,
    planes=(Plane(torch.int32, 16, 32), Plane(torch.int32, 16, 32), Plane(torch.float32, 4, 256)),
    split=_split,
    join=_join,
    decode=_decode,
)
