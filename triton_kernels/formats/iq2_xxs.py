"""IQ2_XXS: 256 weights; weight = d * (scale + 0.5) / 4 * grid entry, with signs.

A block is d (half), then for each group 4 indices of a grid of 256 octets and a word: four times 7 sign bits, the
eighth making their number even, and 4 bits of scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.triton_kernels.formats.grid import (
    IQ2_TABLE,
    all_signs,
    bits_of_octets,
    grid_codes,
    octet_bits,
    octet_words,
    of_four,
    start_of,
    with_eighth,
    without_eighth,
)
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    codes = blocks[..., 2:].unflatten(-1, (8, 8))
    return [torch.cat([codes[..., :4], octet_bits(with_eighth(codes[..., 4:]))], dim=-1), blocks[..., :2]]


def _join(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    codes = codes.unflatten(-1, (8, 8))
    signs = without_eighth(bits_of_octets(codes[..., 4:]))
    return torch.cat([scales, torch.cat([codes[..., :4], signs], dim=-1).flatten(-2)], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    start = start_of(planes[2], group)
    indices, packed = tl.split(elements(planes[0], row, group, groups, 1, 2))
    signs = all_signs(packed)
    first, second = octet_words(start, (indices << 2) & 0x3FC, signs, group, IQ2_TABLE)
    third, fourth = octet_words(start, (indices >> 6) & 0x3FC, signs >> 1, group, IQ2_TABLE)
    low = of_four(first, second, third, fourth)
    first, second = octet_words(start, (indices >> 14) & 0x3FC, signs >> 2, group, IQ2_TABLE)
    third, fourth = octet_words(start, (indices >> 22) & 0x3FC, signs >> 3, group, IQ2_TABLE)
    high = of_four(first, second, third, fourth)
    d = elements(planes[1], row, group, groups, 8, 1).to(tl.float32)
    scale = d * (((packed[:, :, None] >> 28) & 15).to(tl.float32) + 0.5) * 0.25
    return low, high, scale, scale


IQ2_XXS = Format(
    weight_format=WeightFormat.IQ2_XXS,
    planes=(Plane(torch.int32, 8, 32), Plane(torch.float16, 2, 256)),
    split=_split,
    join=_join,
    decode=_decode,
    codebook=lambda: grid_codes("IQ2_XXS"),
)
