"""IQ2_XS: 256 weights; weight = d * (scale + 0.5) / 4 * grid entry, with signs.

A block is d (half), 32 times 9 bits of index into a grid of 512 octets below 7 sign bits, the eighth making their
number even, and a 4-bit scale for every 16 weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.triton_kernels.formats.grid import even_signs, grid_words, group_words, negate, octet_signs, octet_words
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    return [blocks[..., 2:66], blocks[..., 66:], blocks[..., :2]]


def _join(codes: torch.Tensor, scales: torch.Tensor, superscales: torch.Tensor) -> torch.Tensor:
    return torch.cat([superscales, codes, scales], dim=-1)


@triton.jit
def _octets(codebook, codes):
    codes = codes[None] >> (tl.arange(0, 2) * 16)[:, None, None]
    return group_words(negate(octet_words(codebook, codes & 511), octet_signs(even_signs(codes >> 9))))


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    low, high = tl.split(elements(planes[0], row, group, groups, 1, 2))
    scales = elements(planes[1], row, group, groups, 1, 1).to(tl.int32) >> (tl.arange(0, 2) * 4)[None, None, :]
    d = elements(planes[2], row, group, groups, 8, 1).to(tl.float32)
    scale = d * ((scales & 15).to(tl.float32) + 0.5) * 0.25
    return _octets(planes[3], low), _octets(planes[3], high), scale, scale


IQ2_XS = Format(
    weight_format=WeightFormat.IQ2_XS,
    planes=(Plane(torch.int32, 8, 32), Plane(torch.uint8, 1, 32), Plane(torch.float16, 2, 256)),
    split=_split,
    join=_join,
    decode=_decode,
    scale_group=16,
    codebook=lambda: grid_words("IQ2_XS"),
)
