"""IQ4_NL: 32 weights, a half scale and 4-bit indices of a table of 16 signed bytes; weight = d * table[index]."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from gguf import quants

from trichord.triton_kernels.formats.fields import elements
from trichord.triton_kernels.formats.format import Format, Plane
from trichord.triton_kernels.formats.table import ggml_codes, table_codes, table_words, words_from_table
from trichord.weight_format import WeightFormat

IQ4_TABLE = tl.constexpr(table_words(quants.IQ4_NL.kvalues))


def _split(blocks: torch.Tensor) -> list[torch.Tensor]:
    return [table_codes(blocks[..., 2:]), blocks[..., :2]]


def _join(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return torch.cat([scales, ggml_codes(codes)], dim=-1)


@triton.jit
def _decode(planes, row, group, columns):
    groups = columns // 32
    low, high = words_from_table(planes[0], row, group, groups, IQ4_TABLE)
    scale = elements(planes[1], row, group, groups, 1, 1).to(tl.float32)
    return low, high, scale, scale


IQ4_NL = Format(
    weight_format=WeightFormat.IQ4_NL,
    planes=(Plane(torch.int32, 16, 32), Plane(torch.float16, 2, 32)),
    split=_split,
    join=_join,
    decode=_decode,
)
