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
from trichord.triton_kernels.formats.grid import pair_words
from trichord.triton_kernels.primitives import byte_permute, in_register, look_up_8
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    return [blocks[..., :48], blocks[..., 48:52], blocks[..., 52:]]


def _join(digits: torch.Tensor, last: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return torch.cat([digits, last, scales], dim=-1)


# The powers of 3 by which a group's digits become the uppermost, for each group of a block: those of weights 0..15, and
# those of weights 16..31 (the last bytes of group 7 hold several digits, so that each word has its own power).
_LOW_POWERS = tl.constexpr(pair_words([(1, 3), (9, 27), (81, 1), (9, 81)]))
_HIGH_POWERS = tl.constexpr(pair_words([(1, 3), (9, 27), (81, 3), (27, 0)]))


@triton.jit
def _digits(word, power):
    """The digit of each byte of a word, in that byte, which is the uppermost one of its product with a power of 3."""
    even = (((word & 0x00FF00FF) * power) & 0x00FF00FF) * 3
    odd = ((byte_permute(word, word & 0, 0x4341) * power) & 0x00FF00FF) * 3
    return byte_permute(even, odd, 0x7351)


@triton.jit
def _power(part, POWERS: tl.constexpr):
    return look_up_8(part, (in_register(POWERS[0], part), in_register(POWERS[1], part)))[0] & 255


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    index = tl.arange(0, 4)[None, None, :]
    part = (group & 7)[None, :, None]
    later = (part >= 5).to(tl.int32)
    start = planes[0] + (row * (groups // 8 * 12))[:, None, None]
    word = (group // 8 * 12)[None, :, None] + index
    low = tl.load(start + word + later * 8)
    high = tl.load(start + word + later * 4 + 4)
    last = elements(planes[1], row, group, groups, 8, 1)
    power = tl.where(part == 7, (0x1B090301 >> (index * 8)) & 255, _power(part, _HIGH_POWERS))
    low = _digits(low, _power(part, _LOW_POWERS))
    high = _digits(tl.where(part == 7, last, high), power)
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
