"""IQ1_S: 256 weights; weight = d * (2 * scale + 1) * (grid entry + delta), the grid of -1, 0 and 1, delta 1/8 or -1/8.

A block is d (half), the low bytes of 32 indices of a grid of 2048 octets, and 16 bits a group: four times 3 high bits
of an index, 3 bits of scale and the sign of delta. The planes keep indices whole, 11 bits each. The kernels multiply
by integers, 8 * entry + 8 * delta.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import bits_of, bytes_of, elements
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.triton_kernels.formats.grid import gather, grid_codes, of_four, start_of
from trichord.triton_kernels.primitives import look_up_8
from trichord.weight_format import WeightFormat


def _word(*numbers: int) -> int:
    """Three signed bytes and a zero."""
    return struct.unpack("<i", struct.pack("<3bx", *numbers))[0]


_PLUS, _MINUS = tl.constexpr(_word(-7, 1, 9)), tl.constexpr(_word(-9, -1, 7))


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    low = bits_of(blocks[..., 2:34]).unflatten(-1, (8, 4, 8))
    high = bits_of(blocks[..., 34:]).unflatten(-1, (8, 16))
    indices = torch.cat([low, high[..., :12].unflatten(-1, (4, 3))], dim=-1).flatten(-2)
    # The sign comes between the third index and the fourth, so that that one is where `gather` takes it.
    bits = torch.cat([indices[..., :33], high[..., 15:], indices[..., 33:], high[..., 12:15]], dim=-1)
    return [*(bytes_of(part).flatten(-2) for part in bits.split([32, 16], dim=-1)), blocks[..., :2]]


def _join(lower: torch.Tensor, upper: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    bits = torch.cat([bits_of(lower).unflatten(-1, (8, 32)), bits_of(upper).unflatten(-1, (8, 16))], dim=-1)
    indices = torch.cat([bits[..., :33], bits[..., 34:45]], dim=-1).unflatten(-1, (4, 11))
    high = torch.cat([indices[..., 8:].flatten(-2), bits[..., 45:], bits[..., 33:34]], dim=-1)
    return torch.cat([scales, bytes_of(indices[..., :8].flatten(-3)), bytes_of(high.flatten(-2))], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    start = start_of(planes[3], group)
    shape: tl.constexpr = (row.shape[0], group.shape[0])
    lower = tl.reshape(elements(planes[0], row, group, groups, 1, 1), shape).to(tl.uint32, bitcast=True)
    fields = elements(planes[1], row, group, groups, 1, 1).to(tl.uint32)
    upper = tl.reshape(fields, shape)
    table = tl.where((upper & 2) != 0, _MINUS, _PLUS)
    first, second = _octet(start, lower << 2, table)
    third, fourth = _octet(start, lower >> 9, table)
    low = of_four(first, second, third, fourth)
    first, second = _octet(start, (lower >> 20) | (upper << 12), table)
    third, fourth = _octet(start, upper, table)
    high = of_four(first, second, third, fourth)
    d = elements(planes[2], row, group, groups, 8, 1).to(tl.float32)
    scale = d * ((fields >> 13) * 2 + 1).to(tl.int32).to(tl.float32) * 0.125
    return low, high, scale, scale


@triton.jit
def _octet(start, offset, table):
    return look_up_8(gather(start, (offset & 0x1FFC).to(tl.int32, bitcast=True)), (table, table))


IQ1_S = Format(
    weight_format=WeightFormat.IQ1_S,
    planes=(Plane(torch.int32, 4, 32), Plane(torch.uint16, 2, 32), Plane(torch.float16, 2, 256)),
    split=_split,
    join=_join,
    decode=_decode,
    codebook=lambda: grid_codes("IQ1_S") >> 1,  # the ranks themselves
)
