"""IQ1_M: 256 weights; weight = d * (2 * scale + 1) * (grid entry + delta), grid and delta as in IQ1_S.

A block is the low bytes of 32 indices, for each a nibble with 3 high bits and the sign of delta, and four 16-bit
numbers: four 3-bit scales, one for every 16 weights, and at the top a nibble of d (half). The planes keep the two
scales of a group in a byte and d whole: 1.8125 bits a weight instead of 1.75.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.triton_kernels.formats.grid import grid_codes, octet_words
from trichord.triton_kernels.formats.iq1_s import TERNARY_TABLE
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    low, high = blocks[..., 48:].unflatten(-1, (4, 2)).unbind(-1)
    scales = torch.stack([low & 63, low >> 6 | (high & 15) << 2], dim=-1)
    nibbles = (high >> 4).unflatten(-1, (2, 2))
    return [blocks[..., :32], blocks[..., 32:48], scales, nibbles[..., 0] | nibbles[..., 1] << 4]


def _join(indices: torch.Tensor, high: torch.Tensor, scales: torch.Tensor, superscales: torch.Tensor) -> torch.Tensor:
    even, odd = scales.unflatten(-1, (4, 2)).unbind(-1)
    nibbles = torch.stack([superscales & 15, superscales >> 4], dim=-1).flatten(-2)
    packed = torch.stack([even | (odd & 3) << 6, odd >> 2 | nibbles << 4], dim=-1)
    return torch.cat([indices, high, packed.flatten(-2)], dim=-1)


@triton.jit
def _octets(codebook, indices, high, octet, group):
    high = high >> (octet * 4)
    index = ((indices >> (octet * 8)) & 255) | (high << 8) & 0x700
    return octet_words(codebook, index, ((high >> 3) & 1) * 0x11111111, group, TERNARY_TABLE)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    indices = tl.permute(elements(planes[0], row, group, groups, 1, 1), (2, 0, 1))
    high = tl.permute(elements(planes[1], row, group, groups, 1, 1).to(tl.int32), (2, 0, 1))
    octet = tl.arange(0, 2)[:, None, None]
    scales = elements(planes[2], row, group, groups, 1, 1).to(tl.int32) >> (tl.arange(0, 2) * 3)[None, None, :]
    d = elements(planes[3], row, group, groups, 8, 1).to(tl.float32)
    scale = d * ((scales & 7) * 2 + 1).to(tl.float32) * 0.125
    return (
        _octets(planes[4], indices, high, octet, group),
        _octets(planes[4], indices, high, octet + 2, group),
        scale,
        scale,
    )


IQ1_M = Format(
    weight_format=WeightFormat.IQ1_M,
    planes=(
        Plane(torch.int32, 4, 32),
        Plane(torch.int16, 2, 32),
        Plane(torch.uint8, 1, 32),
        Plane(torch.float16, 2, 256),
    ),
    split=_split,
    join=_join,
    decode=_decode,
    scale_group=16,
    codebook=lambda: grid_codes("IQ1_M"),
)
