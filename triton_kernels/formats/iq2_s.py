"""IQ2_S: 256 weights; weight = d * (scale + 0.5) / 4 * grid entry, with signs.

A block is d (half), the low bytes of 32 indices of a grid of 1024 octets, 32 bytes of signs, 8 bytes with the high
pairs of bits of the indices and a 4-bit scale for every 16 weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements, merge, spread
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.triton_kernels.formats.grid import IQ2_TABLE, bits_of_octets, grid_codes, octet_bits, octet_words
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    signs = octet_bits(spread(blocks[..., 34:66].unflatten(-1, (8, 4, 1)), 1))
    codes = torch.stack([blocks[..., 2:34].unflatten(-1, (8, 4)), signs], dim=-2)
    return [codes, torch.stack([blocks[..., 66:74], blocks[..., 74:]], dim=-1), blocks[..., :2]]


def _join(codes: torch.Tensor, scales: torch.Tensor, superscales: torch.Tensor) -> torch.Tensor:
    codes, scales = codes.unflatten(-1, (8, 2, 4)), scales.unflatten(-1, (8, 2))
    signs = merge(bits_of_octets(codes[..., 1, :]), 1).flatten(-3)
    return torch.cat([superscales, codes[..., 0, :].flatten(-2), signs, scales[..., 0], scales[..., 1]], dim=-1)


@triton.jit
def _octets(codebook, indices, high_bits, signs, octet, group):
    index = ((indices >> (octet * 8)) & 255) | ((high_bits << 8) >> (octet * 2)) & 0x300
    return octet_words(codebook, index, signs >> octet, group, IQ2_TABLE)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    indices, signs = tl.split(elements(planes[0], row, group, groups, 1, 2))
    high_bits, scales = tl.split(elements(planes[1], row, group, groups, 1, 2).to(tl.int32))
    octet = tl.arange(0, 2)[:, None, None]
    low = _octets(planes[3], indices[None], high_bits[None], signs[None], octet, group)
    high = _octets(planes[3], indices[None], high_bits[None], signs[None], octet + 2, group)
    d = elements(planes[2], row, group, groups, 8, 1).to(tl.float32)
    scale = d * (((scales[:, :, None] >> (tl.arange(0, 2) * 4)[None, None, :]) & 15).to(tl.float32) + 0.5) * 0.25
    return low, high, scale, scale


IQ2_S = Format(
    weight_format=WeightFormat.IQ2_S,
    planes=(Plane(torch.int32, 8, 32), Plane(torch.uint8, 2, 32), Plane(torch.float16, 2, 256)),
    split=_split,
    join=_join,
    decode=_decode,
    scale_group=16,
    codebook=lambda: grid_codes("IQ2_S"),
)
