"""IQ2_S: 256 weights; weight = d * (scale + 0.5) / 4 * grid entry, with signs.

A block is d (half), the low bytes of 32 indices of a grid of 1024 octets, 32 bytes of signs, 8 bytes with the high
pairs of bits of the indices and a 4-bit scale for every 16 weights. The planes have two words a group: three indices
of 10 bits from bit 2 on and in bits 0 and 1 the lower ones of the fourth; and the signs. Its upper 8 bits are beside
the scales.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import bits_of, bytes_of, elements
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.triton_kernels.formats.grid import (
    IQ2_TABLE,
    bits_of_octets,
    grid_codes,
    octet_bits,
    octet_words,
    of_four,
    start_of,
)
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    low, high = (
        bits_of(blocks[..., 2:34]).unflatten(-1, (8, 4, 8)),
        bits_of(blocks[..., 66:74]).unflatten(-1, (8, 4, 2)),
    )
    indices = torch.cat([low, high], dim=-1).flatten(-2)
    signs = octet_bits(bits_of(blocks[..., 34:66]).unflatten(-1, (8, 4, 8)))
    words = torch.cat([bytes_of(indices[..., :32].roll(2, dims=-1)), signs], dim=-1)
    return [words, torch.stack([bytes_of(indices[..., 32:]).squeeze(-1), blocks[..., 74:]], dim=-1), blocks[..., :2]]


def _join(words: torch.Tensor, pairs: torch.Tensor, superscales: torch.Tensor) -> torch.Tensor:
    words, pairs = words.unflatten(-1, (8, 2, 4)), pairs.unflatten(-1, (8, 2))
    indices = torch.cat([bits_of(words[..., 0, :]).roll(-2, dims=-1), bits_of(pairs[..., :1])], dim=-1)
    low, high = (bytes_of(bits.flatten(-3)) for bits in indices.unflatten(-1, (4, 10)).split([8, 2], dim=-1))
    signs = bytes_of(bits_of_octets(words[..., 1, :]).flatten(-3))
    return torch.cat([superscales, low, signs, high, pairs[..., 1]], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    start = start_of(planes[3], group)
    indices, signs = tl.split(elements(planes[0], row, group, groups, 1, 2))
    word = indices.to(tl.uint32, bitcast=True)
    pair = elements(planes[1], row, group, groups, 1, 1).to(tl.int32)
    last = (tl.reshape(pair, (row.shape[0], group.shape[0])) << 4) & 0xFF0 | (indices & 3) << 2
    first, second = octet_words(start, indices & 0xFFC, signs, group, IQ2_TABLE)
    third, fourth = octet_words(start, ((word >> 10) & 0xFFC).to(tl.int32), signs >> 1, group, IQ2_TABLE)
    low = of_four(first, second, third, fourth)
    first, second = octet_words(start, ((word >> 20) & 0xFFC).to(tl.int32), signs >> 2, group, IQ2_TABLE)
    third, fourth = octet_words(start, last, signs >> 3, group, IQ2_TABLE)
    high = of_four(first, second, third, fourth)
    d = elements(planes[2], row, group, groups, 8, 1).to(tl.float32)
    scale = d * (((pair >> (tl.arange(0, 2) * 4 + 8)[None, None, :]) & 15).to(tl.float32) + 0.5) * 0.25
    return low, high, scale, scale


IQ2_S = Format(
    weight_format=WeightFormat.IQ2_S,
    planes=(Plane(torch.int32, 8, 32), Plane(torch.uint16, 2, 32), Plane(torch.float16, 2, 256)),
    split=_split,
    join=_join,
    decode=_decode,
    scale_group=16,
    codebook=lambda: grid_codes("IQ2_S"),
)
