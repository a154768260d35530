"""NVFP4: 64 weights in E2M1 with an unsigned E4M3 scale for every 16; weight = scale / 2 * (table[code] - 12).

The table is that of MXFP4. A block is 4 scales, then for each 16 weights 8 bytes: byte b holds code b below code 8 + b.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements, merge, spread
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.triton_kernels.formats.mxfp4 import E2M1_TABLE, E2M1_ZERO
from trichord.triton_kernels.formats.table import ggml_codes, table_codes, words_from_table
from trichord.weight_format import WeightFormat


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    codes = spread(blocks[..., 4:].unflatten(-1, (2, 2, 8)), 4).flatten(-2)
    return [table_codes(merge(codes, 4)), blocks[..., :4]]


def _join(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    codes = spread(ggml_codes(codes.unflatten(-1, (2, 16))), 4).unflatten(-1, (2, 16))
    return torch.cat([scales, merge(codes, 4).flatten(-3)], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    low, high = words_from_table(planes[0], row, group, groups, E2M1_TABLE)
    bits = elements(planes[1], row, group, groups, 1, 2).to(tl.int32)
    # The fields of float32, but the exponent's bias is 7 instead of 127; the codes are of twice the weights.
    scale = ((bits & 127) << 20).to(tl.float32, bitcast=True) * 2.0**119
    scale = tl.where(bits == 127, 0.0, scale)  # not a number in E4M3, zero in GGML
    return low, high, scale, scale


NVFP4 = Format(
    weight_format=WeightFormat.NVFP4,
    planes=(Plane(torch.int32, 16, 32), Plane(torch.uint8, 2, 32)),
    split=_split,
    join=_join,
    decode=_decode,
    scale_group=16,
    zero=E2M1_ZERO,
)
