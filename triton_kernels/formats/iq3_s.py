"""IQ3_S: 256 weights; weight = d * (2 * scale + 1) * grid entry, with signs.

A block is d (half), the low bytes of 64 indices of a grid of 512 entries of 4, 8 bytes with their high bits, 32 bytes
of signs and a 4-bit scale a group. The planes keep indices whole, 9 bits each, and a scale in a byte: 3.5625 bits a
weight instead of 3.4375. Word w of a group's two has indices 4w to 4w + 2 from its bit 2 on, then the lower 5 bits of
index 4w + 3, as if bits 0 and 1 followed bit 31; the upper 4 bits are in a nibble beside the scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import bits_of, bytes_of, elements, merge, spread
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.triton_kernels.formats.grid import (
    bits_of_quads,
    gather,
    grid_words,
    of_four,
    quad_bits,
    start_of,
    with_signs,
)
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    low, high = bits_of(blocks[..., 2:66]), bits_of(blocks[..., 66:74])
    indices = torch.cat([low.unflatten(-1, (8, 2, 4, 8)), high.unflatten(-1, (8, 2, 4, 1))], dim=-1).flatten(-2)
    words = bytes_of(indices[..., :32].roll(2, dims=-1))
    scales = spread(blocks[..., 106:, None], 4).flatten(-2)
    nibbles = bytes_of(indices[..., 32:].flatten(-2)).squeeze(-1)
    signs = quad_bits(spread(blocks[..., 74:106].unflatten(-1, (8, 4, 1)), 1))
    return [words.flatten(-3), signs, torch.stack([nibbles, scales], dim=-1), blocks[..., :2]]


def _join(words: torch.Tensor, signs: torch.Tensor, pairs: torch.Tensor, superscales: torch.Tensor) -> torch.Tensor:
    nibbles, scales = pairs.unflatten(-1, (8, 2)).unbind(-1)
    indices = bits_of(words).unflatten(-1, (8, 2, 32)).roll(-2, dims=-1)
    indices = torch.cat([indices, bits_of(nibbles).unflatten(-1, (8, 2, 4))], dim=-1).unflatten(-1, (4, 9))
    low, high = bytes_of(indices[..., :8].flatten(-4)), bytes_of(indices[..., 8].flatten(-3))
    scales = merge(scales.unflatten(-1, (4, 2)), 4).flatten(-2)
    signs = merge(bits_of_quads(signs.unflatten(-1, (8, 4))), 1).flatten(-3)
    return torch.cat([superscales, low, high, signs, scales], dim=-1)


@triton.jit
def _words(start, word, nibble, signs, HALF: tl.constexpr):
    """The four words of half HALF of the group; the nibble is where it belongs in an offset."""
    last = ((word >> 27) | (word << 5)) & 0x7C | nibble & 0x780
    return of_four(
        with_signs(gather(start, (word & 0x7FC).to(tl.int32)), signs, 2 * HALF, 0),
        with_signs(gather(start, ((word >> 9) & 0x7FC).to(tl.int32)), signs, 2 * HALF, 1),
        with_signs(gather(start, ((word >> 18) & 0x7FC).to(tl.int32)), signs, 2 * HALF, 2),
        with_signs(gather(start, last.to(tl.int32)), signs, 2 * HALF, 3),
    )


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    start = start_of(planes[4], group)
    shape: tl.constexpr = (row.shape[0], group.shape[0])
    first, second = tl.split(elements(planes[0], row, group, groups, 1, 2).to(tl.uint32, bitcast=True))
    signs = tl.reshape(elements(planes[1], row, group, groups, 1, 1), shape)
    pair = elements(planes[2], row, group, groups, 1, 1).to(tl.uint32)
    nibbles = tl.reshape(pair, shape)
    d = elements(planes[3], row, group, groups, 8, 1).to(tl.float32)
    scale = d * ((pair >> 8) * 2 + 1).to(tl.int32).to(tl.float32)
    low = _words(start, first, nibbles << 7, signs, 0)
    high = _words(start, second, nibbles << 3, signs, 1)
    return low, high, scale, scale


IQ3_S = Format(
    weight_format=WeightFormat.IQ3_S,
    planes=(
        Plane(torch.int32, 8, 32),
        Plane(torch.int32, 4, 32),
        Plane(torch.uint16, 2, 32),
        Plane(torch.float16, 2, 256),
    ),
    split=_split,
    join=_join,
    decode=_decode,
    codebook=lambda: grid_words("IQ3_S"),
)
