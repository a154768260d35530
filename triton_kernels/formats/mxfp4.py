"""MXFP4: 32 weights in E2M1 with a shared exponent (E8M0), as in the OCP microscaling formats 1.0.

weight = 2^(e - 128) * (table[code] - 12), the table holding twice the values of E2M1, plus 12: none is negative.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from gguf import quants

from trichord.triton_kernels.formats.fields import elements
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.triton_kernels.formats.table import ggml_codes, table_codes, table_words, words_from_table
from trichord.weight_format import WeightFormat

E2M1_ZERO = 12
E2M1_TABLE = tl.constexpr(table_words([value + E2M1_ZERO for value in quants.MXFP4.kvalues]))


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    return [table_codes(blocks[..., 1:]), blocks[..., :1]]


def _join(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return torch.cat([scales, ggml_codes(codes)], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    low, high = words_from_table(planes[0], row, group, groups, E2M1_TABLE)
    exponent = elements(planes[1], row, group, groups, 1, 1).to(tl.int32)
    bits = tl.where(exponent < 2, 0x00200000 << exponent, (exponent - 1) << 23)  # the two lowest are subnormal
    scale = bits.to(tl.float32, bitcast=True)
    return low, high, scale, scale


MXFP4 = Format(
    weight_format=WeightFormat.MXFP4,
    planes=(Plane(torch.int32, 16, 32), Plane(torch.uint8, 1, 32)),
    split=_split,
    join=_join,
    decode=_decode,
    zero=E2M1_ZERO,
)
