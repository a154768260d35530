"""IQ3_XXS: 256 weights; weight = d * (scale + 0.5) / 2 * grid entry, with signs.

A block is d (half), 64 indices of a grid of 256 entries of 4, and for each group a word: four times 7 sign bits, the
eighth making their number even, and 4 bits of scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.triton_kernels.formats.grid import (
    all_signs,
    bits_of_quads,
    gather,
    grid_words,
    of_four,
    quad_bits,
    start_of,
    with_eighth,
    with_signs,
    without_eighth,
)
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    return [blocks[..., 2:66], quad_bits(with_eighth(blocks[..., 66:].unflatten(-1, (8, 4)))), blocks[..., :2]]


def _join(codes: torch.Tensor, scales: torch.Tensor, superscales: torch.Tensor) -> torch.Tensor:
    return torch.cat(
        [superscales, codes, without_eighth(bits_of_quads(scales.unflatten(-1, (8, 4)))).flatten(-2)], dim=-1
    )


@triton.jit
def _words(start, indices, signs, HALF: tl.constexpr):
    return of_four(
        with_signs(gather(start, (indices << 2) & 0x3FC), signs, 2 * HALF, 0),
        with_signs(gather(start, (indices >> 6) & 0x3FC), signs, 2 * HALF, 1),
        with_signs(gather(start, (indices >> 14) & 0x3FC), signs, 2 * HALF, 2),
        with_signs(gather(start, (indices >> 22) & 0x3FC), signs, 2 * HALF, 3),
    )


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    start = start_of(planes[3], group)
    low, high = tl.split(elements(planes[0], row, group, groups, 1, 2))
    packed = elements(planes[1], row, group, groups, 1, 1)
    signs = all_signs(tl.reshape(packed, (row.shape[0], group.shape[0])))
    d = elements(planes[2], row, group, groups, 8, 1).to(tl.float32)
    scale = d * (((packed >> 28) & 15).to(tl.float32) + 0.5) * 0.5
    return _words(start, low, signs, 0), _words(start, high, signs, 1), scale, scale


IQ3_XXS = Format(
    weight_format=WeightFormat.IQ3_XXS,
    planes=(Plane(torch.int32, 8, 32), Plane(torch.int32, 4, 32), Plane(torch.float16, 2, 256)),
    split=_split,
    join=_join,
    decode=_decode,
    codebook=lambda: grid_words("IQ3_XXS"),
)
