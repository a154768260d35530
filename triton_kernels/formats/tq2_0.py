"""TQ2_0: 256 weights, 2-bit codes of -1, 0 and 1, and a half scale; weight = d * (code - 1)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements, merge, spread, words
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    codes = spread(blocks[..., :64].unflatten(-1, (2, 32)), 2).unflatten(-1, (4, 32))
    return [merge(codes, 2), blocks[..., 64:]]


def _join(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    codes = spread(codes.unflatten(-1, (2, 4, 8)), 2).flatten(-2)
    return torch.cat([merge(codes, 2).flatten(-2), scales], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    low, high = words(planes[0], row, group, groups, 2)
    scale = elements(planes[1], row, group, groups, 8, 1).to(tl.float32)
    return low, high, scale, scale


TQ2_0 = Format(
    weight_format=WeightFormat.TQ2_0,
    planes=(Plane(torch.int32, 8, 32), Plane(torch.float16, 2, 256)),
    split=_split,
    join=_join,
    decode=_decode,
    zero=1,
)
