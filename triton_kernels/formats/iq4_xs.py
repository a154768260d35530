"""IQ4_XS: 256 weights, indices of IQ4_NL's table, a signed scale of 6 bits a group; weight = d * scale * table[index].

A block is d (half), 2 bytes with the high pairs of bits of the 8 scales plus 32, 4 bytes with their low nibbles, both
in order, and 128 bytes of indices. The planes keep a scale in a byte: 4.3125 bits a weight instead of 4.25.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements, merge, spread
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.triton_kernels.formats.iq4_nl import IQ4_TABLE
from trichord.triton_kernels.formats.table import ggml_codes, table_codes, words_from_table
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    high, low = spread(blocks[..., 2:4, None], 2).flatten(-2), spread(blocks[..., 4:8, None], 4).flatten(-2)
    return [table_codes(blocks[..., 8:].unflatten(-1, (8, 16))), (low | high << 4) - 32, blocks[..., :2]]


def _join(codes: torch.Tensor, scales: torch.Tensor, superscales: torch.Tensor) -> torch.Tensor:
    scales = scales + 32
    high = merge((scales >> 4).unflatten(-1, (2, 4)), 2).flatten(-2)
    low = merge((scales & 15).unflatten(-1, (4, 2)), 4).flatten(-2)
    return torch.cat([superscales, high, low, ggml_codes(codes.unflatten(-1, (8, 16))).flatten(-2)], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    low, high = words_from_table(planes[0], row, group, groups, IQ4_TABLE)
    scale = elements(planes[1], row, group, groups, 1, 1).to(tl.float32)
    scale *= elements(planes[2], row, group, groups, 8, 1).to(tl.float32)
    return low, high, scale, scale


IQ4_XS = Format(
    weight_format=WeightFormat.IQ4_XS,
    planes=(Plane(torch.int32, 16, 32), Plane(torch.int8, 1, 32), Plane(torch.float16, 2, 256)),
    split=_split,
    join=_join,
    decode=_decode,
)
