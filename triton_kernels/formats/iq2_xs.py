"""IQ2_XS: 256 weights; weight = d * (scale + 0.5) / 4 * grid entry, with signs.

A block is d (half), 32 times 9 bits of index into a grid of 512 octets below 7 sign bits, the eighth making their
number even, and a 4-bit scale for every 16 weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements, merge, spread
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.triton_kernels.formats.grid import (
    IQ2_TABLE,
    all_signs,
    bits_of_octets,
    grid_codes,
    octet_bits,
    octet_words,
)
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    bits = spread(blocks[..., 2:66].unflatten(-1, (8, 4, 2, 1)), 1).flatten(-2)
    signs = octet_bits(torch.cat([bits[..., 9:], bits[..., 8:9]], dim=-1))
    return [torch.cat([merge(bits[..., :8], 1).flatten(-2), signs], dim=-1), blocks[..., 66:], blocks[..., :2]]


def _join(codes: torch.Tensor, scales: torch.Tensor, superscales: torch.Tensor) -> torch.Tensor:
    indices, signs = codes.unflatten(-1, (8, 2, 4)).unbind(-2)
    signs = bits_of_octets(signs)
    high = merge(torch.cat([signs[..., 7:], signs[..., :7]], dim=-1), 1)
    return torch.cat([superscales, torch.stack([indices, high.squeeze(-1)], dim=-1).flatten(-3), scales], dim=-1)


@triton.jit
def _octets(codebook, indices, high_bits, signs, octet, group):
    index = ((indices >> (octet * 8)) & 255) | (high_bits >> (octet + 20)) & 256
    return octet_words(codebook, index, signs >> octet, group, IQ2_TABLE)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    indices, packed = tl.split(elements(planes[0], row, group, groups, 1, 2))
    signs, octet = all_signs(packed), tl.arange(0, 2)[:, None, None]
    low = _octets(planes[3], indices[None], packed[None], signs[None], octet, group)
    high = _octets(planes[3], indices[None], packed[None], signs[None], octet + 2, group)
    scales = elements(planes[1], row, group, groups, 1, 1).to(tl.int32) >> (tl.arange(0, 2) * 4)[None, None, :]
    d = elements(planes[2], row, group, groups, 8, 1).to(tl.float32)
    scale = d * ((scales & 15).to(tl.float32) + 0.5) * 0.25
    return low, high, scale, scale


IQ2_XS = Format(
    weight_format=WeightFormat.IQ2_XS,
    planes=(Plane(torch.int32, 8, 32), Plane(torch.uint8, 1, 32), Plane(torch.float16, 2, 256)),
    split=_split,
    join=_join,
    decode=_decode,
    scale_group=16,
    codebook=lambda: grid_codes("IQ2_XS"),
)
