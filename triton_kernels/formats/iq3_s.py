"""IQ3_S: 256 weights; weight = d * (2 * scale + 1) * grid entry, with signs.

A block is d (half), the low bytes of 64 indices of a grid of 512 entries of 4, 8 bytes with their high bits, 32 bytes
of signs and a 4-bit scale a group. The planes keep a scale in a byte: 3.5625 bits a weight instead of 3.4375.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements, merge, spread
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.triton_kernels.formats.grid import bits_of_quads, grid_words, quad_bits, quad_words
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    scales = spread(blocks[..., 106:, None], 4).flatten(-2)
    signs = quad_bits(spread(blocks[..., 74:106].unflatten(-1, (8, 4, 1)), 1))
    return [blocks[..., 2:66], signs, torch.stack([blocks[..., 66:74], scales], dim=-1), blocks[..., :2]]


def _join(codes: torch.Tensor, signs: torch.Tensor, pairs: torch.Tensor, superscales: torch.Tensor) -> torch.Tensor:
    high_bits, scales = pairs.unflatten(-1, (8, 2)).unbind(-1)
    scales = merge(scales.unflatten(-1, (4, 2)), 4).flatten(-2)
    signs = merge(bits_of_quads(signs.unflatten(-1, (8, 4))), 1).flatten(-3)
    return torch.cat([superscales, codes, high_bits, signs, scales], dim=-1)


@triton.jit
def _words(codebook, indices, high_bits, signs, HALF: tl.constexpr):
    entry = tl.arange(0, 4)[:, None, None]
    index = ((indices[None] >> (entry * 8)) & 255) | ((high_bits[None] << 8) >> (4 * HALF + entry)) & 256
    return quad_words(codebook, index, signs, HALF)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    low, high = tl.split(elements(planes[0], row, group, groups, 1, 2))
    signs = tl.permute(elements(planes[1], row, group, groups, 1, 1), (2, 0, 1))
    high_bits, scale = tl.split(elements(planes[2], row, group, groups, 1, 2).to(tl.int32))
    d = elements(planes[3], row, group, groups, 8, 1).to(tl.float32)
    scale = d * (scale * 2 + 1).to(tl.float32)[:, :, None]
    low = _words(planes[4], low, high_bits, signs, 0)
    high = _words(planes[4], high, high_bits, signs, 1)
    return low, high, scale, scale


IQ3_S = Format(
    weight_format=WeightFormat.IQ3_S,
    planes=(
        Plane(torch.int32, 8, 32),
        Plane(torch.int32, 4, 32),
        Plane(torch.uint8, 2, 32),
        Plane(torch.float16, 2, 256),
    ),
    split=_split,
    join=_join,
    decode=_decode,
    codebook=lambda: grid_words("IQ3_S"),
)
