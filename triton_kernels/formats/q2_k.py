"""Q2_K: 256 weights, 2-bit codes; weight = d * scale * code - dmin * minimum.

A block is 16 bytes with a scale (low) and a minimum (high) of 4 bits for every 16 weights, 64 bytes of codes, d and
dmin (halves).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements, merge, spread, words
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    codes = spread(blocks[..., 16:80].unflatten(-1, (2, 32)), 2).unflatten(-1, (4, 32))
    return [merge(codes, 2), blocks[..., :16], blocks[..., 80:]]


def _join(codes: torch.Tensor, scales: torch.Tensor, superscales: torch.Tensor) -> torch.Tensor:
    codes = spread(codes.unflatten(-1, (2, 4, 8)), 2).flatten(-2)
    return torch.cat([scales, merge(codes, 2).flatten(-2), superscales], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    low, high = words(planes[0], row, group, groups, 2)
    fields = elements(planes[1], row, group, groups, 1, 2).to(tl.int32)
    d, dmin = tl.split(elements(planes[2], row, group, groups, 8, 2).to(tl.float32))
    scale = (fields & 15).to(tl.float32) * d[:, :, None]
    minimum = (fields >> 4).to(tl.float32) * dmin[:, :, None]
    return low, high, scale, minimum


Q2_K = Format(
    weight_format=WeightFormat.Q2_K,
    planes=(Plane(torch.int32, 8, 32), Plane(torch.uint8, 2, 32), Plane(torch.float16, 4, 256)),
    split=_split,
    join=_join,
    decode=_decode,
    scale_group=16,
    has_minimum=True,
)
