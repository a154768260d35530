"""Q6_K: 256 weights, 6-bit codes with a signed byte of scale for every 16; weight = d * scale * (code - 32).

A block is 128 bytes of low nibbles, 64 bytes of high pairs of bits, 16 scales and d (half).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements, merge, spread, words
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    low = spread(blocks[..., :128].unflatten(-1, (2, 64)), 4).unflatten(-1, (4, 32))
    high = spread(blocks[..., 128:192].unflatten(-1, (2, 32)), 2).unflatten(-1, (4, 32))
    return [merge(low, 4), merge(high, 2), blocks[..., 192:208], blocks[..., 208:]]


def _join(low: torch.Tensor, high: torch.Tensor, scales: torch.Tensor, superscales: torch.Tensor) -> torch.Tensor:
    low = spread(low.unflatten(-1, (2, 4, 16)), 4).flatten(-2)
    high = spread(high.unflatten(-1, (2, 4, 8)), 2).flatten(-2)
    return torch.cat([merge(low, 4).flatten(-2), merge(high, 2).flatten(-2), scales, superscales], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    low, high = words(planes[0], row, group, groups, 4)
    low_pair, high_pair = words(planes[1], row, group, groups, 2, 4)
    scale = elements(planes[2], row, group, groups, 1, 2).to(tl.float32)
    scale *= elements(planes[3], row, group, groups, 8, 1).to(tl.float32)
    return low | low_pair, high | high_pair, scale, scale


Q6_K = Format(
    weight_format=WeightFormat.Q6_K,
    planes=(
        Plane(torch.int32, 16, 32),
        Plane(torch.int32, 8, 32),
        Plane(torch.int8, 2, 32),
        Plane(torch.float16, 2, 256),
    ),
    split=_split,
    join=_join,
    decode=_decode,
    scale_group=16,
    zero=32,
)
