"""Q5_K: Q4_K with a fifth bit; weight = d * scale * code - dmin * minimum.

A block is d and dmin (halves), 12 bytes of scales and minimums as in Q4_K, 32 bytes of high bits and 128 of low ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl  # noqa: F401 - Triton's interpreter looks for it in every module of kernels

from trichord.triton_kernels.formats.fields import merge, spread, words
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.triton_kernels.formats.q4_k import merge_scales, scale_and_minimum, spread_scales
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    low = spread(blocks[..., 48:].unflatten(-1, (4, 32)), 4).unflatten(-1, (2, 32))
    high = spread(blocks[..., 16:48], 1).unflatten(-1, (8, 32))
    return [merge(low, 4), merge(high, 1), spread_scales(blocks[..., 4:16]), blocks[..., :4]]


def _join(low: torch.Tensor, high: torch.Tensor, scales: torch.Tensor, superscales: torch.Tensor) -> torch.Tensor:
    low = spread(low.unflatten(-1, (8, 16)), 4).unflatten(-2, (4, 2)).flatten(-2)
    high = spread(high.unflatten(-1, (8, 4)), 1).flatten(-2)
    return torch.cat([superscales, merge_scales(scales), merge(high, 1), merge(low, 4).flatten(-2)], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    low, high = words(planes[0], row, group, groups, 4)
    low_bit, high_bit = words(planes[1], row, group, groups, 1, 4)
    scale, minimum = scale_and_minimum(planes[2], planes[3], row, group, groups)
    return low | low_bit, high | high_bit, scale, minimum


Q5_K = Format(
    weight_format=WeightFormat.Q5_K,
    planes=(
        Plane(torch.int32, 16, 32),
        Plane(torch.int32, 4, 32),
        Plane(torch.uint8, 2, 32),
        Plane(torch.float16, 4, 256),
    ),
    split=_split,
    join=_join,
    decode=_decode,
    has_minimum=True,
)
