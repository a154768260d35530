"""IQ1_S: 256 weights; weight = d * (2 * scale + 1) * (grid entry + delta), the grid of -1, 0 and 1, delta 1/8 or -1/8.

A block is d (half), the low bytes of 32 indices of a grid of 2048 octets, and 16 bits a group: four times 3 high bits
of an index, 3 bits of scale and the sign of delta. The kernels multiply by integers, 8 * entry + 8 * delta.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.triton_kernels.formats.grid import grid_codes, octet_words, pair_words
from trichord.weight_format import WeightFormat

TERNARY_TABLE = tl.constexpr(pair_words([(-7, -9), (1, -1), (9, 7)]))


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    return [blocks[..., 2:34], blocks[..., 34:], blocks[..., :2]]


def _join(indices: torch.Tensor, high: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return torch.cat([scales, indices, high], dim=-1)


@triton.jit
def _octets(codebook, indices, high, octet, group):
    index = ((indices >> (octet * 8)) & 255) | ((high << 8) >> (octet * 3)) & 0x700
    return octet_words(codebook, index, high >> 31, group, TERNARY_TABLE)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    indices = tl.permute(elements(planes[0], row, group, groups, 1, 1), (2, 0, 1))
    fields = elements(planes[1], row, group, groups, 1, 1).to(tl.int32)
    high = tl.permute(fields, (2, 0, 1))
    octet = tl.arange(0, 2)[:, None, None]
    d = elements(planes[2], row, group, groups, 8, 1).to(tl.float32)
    scale = d * (((fields >> 12) & 7) * 2 + 1).to(tl.float32) * 0.125
    return (
        _octets(planes[3], indices, high, octet, group),
        _octets(planes[3], indices, high, octet + 2, group),
        scale,
        scale,
    )


IQ1_S = Format(
    weight_format=WeightFormat.IQ1_S,
    planes=(Plane(torch.int32, 4, 32), Plane(torch.int16, 2, 32), Plane(torch.float16, 2, 256)),
    split=_split,
    join=_join,
    decode=_decode,
    codebook=lambda: grid_codes("IQ1_S"),
)
