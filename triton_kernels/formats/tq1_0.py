"""TQ1_0: 256 weights of -1, 0 and 1 in base 3, and a half scale; weight = d * (digit - 1).

A byte q holds five digits as a fraction: digit n is the integer part of 3 * (q * 3^n mod 256) / 256. Byte b of the
first 32 holds weights b, b + 32, ... b + 128; byte b of the next 16 holds weights 160 + b, 176 + b, ... 224 + b; byte
b of the last 4 holds four digits, weights 240 + b, 244 + b, 248 + b and 252 + b. The planes keep
this order, the last 4 bytes apart.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    return [blocks[..., :48], blocks[..., 48:52], blocks[..., 52:]]


def _join(digits: torch.Tensor, last: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return torch.cat([digits, last, scales], dim=-1)


@triton.jit
def _digits(word, n):
    """Digit n of each byte of a word, in that byte."""
    power = tl.where((n & 1) != 0, 3, 1) * tl.where((n & 2) != 0, 9, 1) * tl.where((n & 4) != 0, 81, 1)
    even = (((word & 0x00FF00FF) * power) & 0x00FF00FF) * 3
    odd = ((((word >> 8) & 0x00FF00FF) * power) & 0x00FF00FF) * 3
    return ((even >> 8) & 0x00030003) | (odd & 0x03000300)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    index = tl.arange(0, 4)[None, None, :]
    part = (group % 8)[None, :, None]
    later = (part >= 5).to(tl.int32)
    start = planes[0] + (row * (groups // 8 * 12))[:, None, None]
    word = (group // 8 * 12)[None, :, None] + index
    low = tl.load(start + word + later * 8)
    high = tl.load(start + word + later * 4 + 4)
    last = elements(planes[1], row, group, groups, 8, 1)
    digit = part + later * (part - 10)  # 0 to 4 for groups 0 to 4; 0, 2 and 4 for the others
    low = _digits(low, digit)
    high = _digits(tl.where(part == 7, last, high), tl.where(part == 7, index, digit + later))
    scale = elements(planes[2], row, group, groups, 8, 1).to(tl.float32)
    return low, high, scale, scale


TQ1_0 = Format(
    weight_format=WeightFormat.TQ1_0,
    planes=(Plane(torch.int32, 48, 256), Plane(torch.int32, 4, 256), Plane(torch.float16, 2, 256)),
    split=_split,
    join=_join,
    decode=_decode,
    zero=1,
)
