"""Q3_K: 256 weights, 3-bit codes with a signed scale of 6 bits for every 16; weight = d * scale * (code - 4).

A block is 32 bytes of high bits, 64 bytes of low pairs of bits, 12 bytes of scales plus 32 (low nibbles in 8 bytes,
high pairs in 4) and d (half). The planes keep a scale in a byte: 3.5625 bits a weight instead of 3.4375.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements, merge, spread, words
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    high = spread(blocks[..., :32], 1).unflatten(-1, (8, 32))
    low = spread(blocks[..., 32:96].unflatten(-1, (2, 32)), 2).unflatten(-1, (4, 32))
    scales = spread(blocks[..., 96:104], 4) | spread(blocks[..., 104:108], 2) << 4
    return [merge(low, 2), merge(high, 1), scales - 32, blocks[..., 108:]]


def _join(low: torch.Tensor, high: torch.Tensor, scales: torch.Tensor, superscales: torch.Tensor) -> torch.Tensor:
    high = spread(high.unflatten(-1, (8, 4)), 1).flatten(-2)
    low = spread(low.unflatten(-1, (2, 4, 8)), 2).flatten(-2)
    scales = scales + 32
    scales = torch.cat([merge(scales & 15, 4), merge(scales >> 4, 2)], dim=-1)
    return torch.cat([merge(high, 1), merge(low, 2).flatten(-2), scales, superscales], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    low, high = words(planes[0], row, group, groups, 2)
    low_bit, high_bit = words(planes[1], row, group, groups, 1, 2)
    scale = elements(planes[2], row, group, groups, 1, 2).to(tl.float32)
    scale *= elements(planes[3], row, group, groups, 8, 1).to(tl.float32)
    return low | low_bit, high | high_bit, scale, scale


Q3_K = Format(
    weight_format=WeightFormat.Q3_K,
    planes=(
        Plane(torch.int32, 8, 32),
        Plane(torch.int32, 4, 32),
        Plane(torch.int8, 2, 32),
        Plane(torch.float16, 2, 256),
    ),
    split=_split,
    join=_join,
    decode=_decode,
    scale_group=16,
    zero=4,
)
