"""Codes that index a table of 16 signed bytes.

The planes keep the codes of a group as `primitives.look_up_16` takes them: word w has those of weights 4w to 4w + 3 in
its lower nibbles and those of weights 16 + 4w to 16 + 4w + 3 in its upper ones. And bits 2 and 3 of each code are
exchanged, so that in a table in ascending order the entries 8 apart have one sign.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.formats.fields import elements, merge, spread
from trichord.triton_kernels.primitives import in_register, look_up_16


def table_words(values: Sequence[int]) -> tuple[int, ...]:
    """16 signed bytes in the order of GGML's codes -> four words as `primitives.look_up_16` takes them."""
    ordered = [values[_exchanged(code)] for code in range(16)]
    first, second = ordered[:8], ordered[8:]
    if any((a < 0) != (b < 0) for a, b in zip(first, second, strict=True)):
        raise ValueError("a table must have as many negative entries as look_up_16 can pair")
    inverted = [b ^ (a >> 7) for a, b in zip(first, second, strict=True)]
    return struct.unpack("<4i", struct.pack("<16b", *first, *inverted))


def table_codes(codes: torch.Tensor) -> torch.Tensor:
    """16 bytes a group as GGML keeps codes (code b below code 16 + b) -> the plane's (..., 16)."""
    words = _exchanged(spread(codes, 4)).unflatten(-1, (2, 4, 2, 2)).transpose(-4, -3)
    return merge(words, 4).flatten(-4)


def ggml_codes(plane: torch.Tensor) -> torch.Tensor:
    """The inverse of `table_codes`."""
    words = spread(plane.unflatten(-1, (4, 2, 2, 1)), 4).transpose(-4, -3)
    return merge(_exchanged(words.flatten(-4)), 4)


def _exchanged(codes):
    """Codes with bits 2 and 3 exchanged."""
    return (codes & 3) | (codes & 4) << 1 | (codes & 8) >> 1


@triton.jit
def words_from_table(plane, row, group, groups, TABLE: tl.constexpr):
    """The table's bytes for each group's codes: weights 0..15 and 16..31, two (R, G, 4) int32."""
    thread = group[None, :, None]
    first = in_register(TABLE[0], thread), in_register(TABLE[1], thread)
    second = in_register(TABLE[2], thread), in_register(TABLE[3], thread)
    return look_up_16(elements(plane, row, group, groups, 1, 4), first + second)
