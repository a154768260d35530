"""IQ2_XS: 256 weights; weight = d * (scale + 0.5) / 4 * grid entry, with signs.

A block is d (half), 32 times 9 bits of index into a grid of 512 octets below 7 sign bits, the eighth making their
number even, and a 4-bit scale for every 16 weights. The planes have two words a group: three indices from bit 2 on and
the lower 5 bits of the fourth, as if bits 0 and 1 followed bit 31; and the signs, with its upper 4 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import bits_of, bytes_of, elements
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
)
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    bits = bits_of(blocks[..., 2:66]).unflatten(-1, (8, 4, 16))
    indices = bits[..., :9].flatten(-2)
    signs = octet_bits(torch.cat([bits[..., 9:], indices[..., 32:, None]], dim=-1))
    words = torch.cat([bytes_of(indices[..., :32].roll(2, dims=-1)), signs], dim=-1)
    return [words, blocks[..., 66:], blocks[..., :2]]


def _join(words: torch.Tensor, scales: torch.Tensor, superscales: torch.Tensor) -> torch.Tensor:
    indices, signs = words.unflatten(-1, (8, 2, 4)).unbind(-2)
    signs = bits_of_octets(signs)
    indices = torch.cat([bits_of(indices).roll(-2, dims=-1), signs[..., 7]], dim=-1).unflatten(-1, (4, 9))
    codes = bytes_of(torch.cat([indices, signs[..., :7]], dim=-1).flatten(-3))
    return torch.cat([superscales, codes, scales], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    start = start_of(planes[3], group)
    indices, packed = tl.split(elements(planes[0], row, group, groups, 1, 2))
    word = indices.to(tl.uint32, bitcast=True)
    signs = all_signs(packed)
    last = ((word >> 27) | (word << 5)) & 0x7C | (packed.to(tl.uint32, bitcast=True) >> 21) & 0x780
    first, second = octet_words(start, (word & 0x7FC).to(tl.int32), signs, group, IQ2_TABLE)
    third, fourth = octet_words(start, ((word >> 9) & 0x7FC).to(tl.int32), signs >> 1, group, IQ2_TABLE)
    low = of_four(first, second, third, fourth)
    first, second = octet_words(start, ((word >> 18) & 0x7FC).to(tl.int32), signs >> 2, group, IQ2_TABLE)
    third, fourth = octet_words(start, last.to(tl.int32), signs >> 3, group, IQ2_TABLE)
    high = of_four(first, second, third, fourth)
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
