"""IQ1_M: 256 weights; weight = d * (2 * scale + 1) * (grid entry + delta), grid and delta as in IQ1_S.

A block is the low bytes of 32 indices, for each a nibble with 3 high bits and the sign of delta, and four 16-bit
numbers: four 3-bit scales, one for every 16 weights, and at the top a nibble of d (half). The planes keep what belongs
to an octet together, 12 bits that index a codebook of both signs; of these four times 12 the first 32 and the last 16
apart, the two scales of a group in a byte, and d whole: 1.8125 bits a weight instead of 1.75.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import bits_of, bytes_of, elements
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.triton_kernels.formats.grid import gather, grid_codes, of_four, pair_words, start_of
from trichord.triton_kernels.primitives import in_register, look_up_8
from trichord.weight_format import WeightFormat

_TABLE = tl.constexpr(pair_words([(-7, -9), (1, -1), (9, 7)]))


def _codebook() -> np.ndarray:
    codes = grid_codes("IQ1_M")
    return np.concatenate([codes, codes | 0x11111111])


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    low, high = blocks[..., 48:].unflatten(-1, (4, 2)).unbind(-1)
    scales = torch.stack([low & 63, low >> 6 | (high & 15) << 2], dim=-1)
    nibbles = (high >> 4).unflatten(-1, (2, 2))
    indices = bits_of(blocks[..., :32]).unflatten(-1, (8, 4, 8))
    octets = torch.cat([indices, bits_of(blocks[..., 32:48]).unflatten(-1, (8, 4, 4))], dim=-1).flatten(-2)
    planes = [bytes_of(bits).flatten(-2) for bits in octets.split([32, 16], dim=-1)]
    return [*planes, scales, nibbles[..., 0] | nibbles[..., 1] << 4]


def _join(lower: torch.Tensor, upper: torch.Tensor, scales: torch.Tensor, superscales: torch.Tensor) -> torch.Tensor:
    octets = torch.cat([bits_of(lower).unflatten(-1, (8, 32)), bits_of(upper).unflatten(-1, (8, 16))], dim=-1)
    indices, high = (bytes_of(bits.flatten(-3)) for bits in octets.unflatten(-1, (4, 12)).split([8, 4], dim=-1))
    even, odd = scales.unflatten(-1, (4, 2)).unbind(-1)
    nibbles = torch.stack([superscales & 15, superscales >> 4], dim=-1).flatten(-2)
    packed = torch.stack([even | (odd & 3) << 6, odd >> 2 | nibbles << 4], dim=-1)
    return torch.cat([indices, high, packed.flatten(-2)], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    start = start_of(planes[4], group)
    shape: tl.constexpr = (row.shape[0], group.shape[0])
    lower = tl.reshape(elements(planes[0], row, group, groups, 1, 1), shape).to(tl.uint32, bitcast=True)
    upper = tl.reshape(elements(planes[1], row, group, groups, 1, 1), shape).to(tl.uint32)
    table = in_register(_TABLE[0], group[None, :]), in_register(_TABLE[1], group[None, :])
    # Four times twice 6 bits and 2 zeros: offsets of words.
    first, second = _octet(start, lower << 2, table)
    third, fourth = _octet(start, lower >> 10, table)
    low = of_four(first, second, third, fourth)
    first, second = _octet(start, (lower >> 22) | (upper << 10), table)
    third, fourth = _octet(start, upper >> 2, table)
    high = of_four(first, second, third, fourth)
    scales = elements(planes[2], row, group, groups, 1, 1).to(tl.int32) >> (tl.arange(0, 2) * 3)[None, None, :]
    d = elements(planes[3], row, group, groups, 8, 1).to(tl.float32)
    scale = d * ((scales & 7) * 2 + 1).to(tl.float32) * 0.125
    return low, high, scale, scale


@triton.jit
def _octet(start, offset, table):
    return look_up_8(gather(start, (offset & 0x3FFC).to(tl.int32, bitcast=True)), table)


IQ1_M = Format(
    weight_format=WeightFormat.IQ1_M,
    planes=(
        Plane(torch.int32, 4, 32),
        Plane(torch.uint16, 2, 32),
        Plane(torch.uint8, 1, 32),
        Plane(torch.float16, 2, 256),
    ),
    split=_split,
    join=_join,
    decode=_decode,
    scale_group=16,
    codebook=_codebook,
)
