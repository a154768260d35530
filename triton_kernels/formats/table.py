"""Codes that index a table of 16 signed bytes."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements
from trichord.triton_kernels.primitives import look_up


def table_words(values: Sequence[int]) -> tuple[int, ...]:
    """16 signed bytes as four words, lowest first: what kernels take as a constant."""
    return struct.unpack("<4i", struct.pack("<16b", *values))


@triton.jit
def words_from_table(plane, row, group, groups, TABLE: tl.constexpr):
    """The table's bytes for each group's 4-bit codes, arranged as for `fields.words`: two (R, G, 4) int32."""
    return look_up(elements(plane, row, group, groups, 1, 4), TABLE)
