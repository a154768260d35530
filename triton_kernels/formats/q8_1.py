"""Q8_1: 32 weights, a half scale, d times the sum of the bytes as a half, and signed bytes; weight = d * byte.

GGML keeps activations in this format. The sum is of no use to the kernels, but `unpack` gives it back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    return [blocks[..., 4:20], blocks[..., 20:], blocks[..., :2], blocks[..., 2:4]]


def _join(low: torch.Tensor, high: torch.Tensor, scales: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    return torch.cat([scales, sums, low, high], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    low = elements(planes[0], row, group, groups, 1, 4)
    high = elements(planes[1], row, group, groups, 1, 4)
    scale = elements(planes[2], row, group, groups, 1, 1).to(tl.float32)
    return low, high, scale, scale


Q8_1 = Format(
    weight_format=WeightFormat.Q8_1,
    planes=(
        Plane(torch.int32, 16, 32),
        Plane(torch.int32, 16, 32),
        Plane(torch.float16, 2, 32),
        Plane(torch.float16, 2, 32),
    ),
    split=_split,
    join=_join,
    decode=_decode,
)
