"""Q4_K: 256 weights, 4-bit codes in groups of 32; weight = d * scale * code - dmin * minimum.

A block is d and dmin (halves), 8 scales and 8 minimums of 6 bits in 12 bytes, and 128 bytes of codes. The planes keep
scale and minimum in a byte each: 4.625 bits a weight instead of 4.5.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements, merge, spread, words
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.weight_format import WeightFormat


def spread_scales(packed: torch.Tensor) -> torch.Tensor:
    """12 bytes of 6-bit fields (..., 12) -> (..., 16): scale and minimum of each of the 8 groups in turn.

    Groups 0 to 3 have theirs in the low bits of bytes 0 to 7; groups 4 to 7 have four bits in bytes 8 to 11 (scale
    low, minimum high) and two in the high bits of bytes 0 to 7.
    """
    first, last = packed[..., :8].unflatten(-1, (2, 4)), packed[..., None, 8:]
    nibbles = torch.cat([last & 15, last >> 4], dim=-2)
    return torch.cat([first & 63, nibbles | first >> 6 << 4], dim=-1).transpose(-1, -2).flatten(-2)


def merge_scales(scales: torch.Tensor) -> torch.Tensor:
    """The inverse of `spread_scales`: (..., 16) -> (..., 12)."""
    fields = scales.unflatten(-1, (8, 2)).transpose(-1, -2)
    head, tail = fields[..., :4], fields[..., 4:]
    return torch.cat([(head | tail >> 4 << 6).flatten(-2), tail[..., 0, :] & 15 | (tail[..., 1, :] & 15) << 4], dim=-1)


@triton.jit
def scale_and_minimum(scales, superscales, row, group, groups):
    """Products of the 6-bit fields with d and dmin: two (R, G, 1) float32."""
    scale, minimum = tl.split(elements(scales, row, group, groups, 1, 2).to(tl.float32))
    d, dmin = tl.split(elements(superscales, row, group, groups, 8, 2).to(tl.float32))
    return (scale * d)[:, :, None], (minimum * dmin)[:, :, None]


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    codes = spread(blocks[..., 16:].unflatten(-1, (4, 32)), 4).unflatten(-1, (2, 32))
    return [merge(codes, 4), spread_scales(blocks[..., 4:16]), blocks[..., :4]]


def _join(codes: torch.Tensor, scales: torch.Tensor, superscales: torch.Tensor) -> torch.Tensor:
    codes = spread(codes.unflatten(-1, (8, 16)), 4).unflatten(-2, (4, 2)).flatten(-2)
    return torch.cat([superscales, merge_scales(scales), merge(codes, 4).flatten(-2)], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    low, high = words(planes[0], row, group, groups, 4)
    scale, minimum = scale_and_minimum(planes[1], planes[2], row, group, groups)
    return low, high, scale, minimum


Q4_K = Format(
    weight_format=WeightFormat.Q4_K,
    planes=(Plane(torch.int32, 16, 32), Plane(torch.uint8, 2, 32), Plane(torch.float16, 4, 256)),
    split=_split,
    join=_join,
    decode=_decode,
    has_minimum=True,
)
