"""Grids: codebooks of 8 or 4 small numbers an entry, whose signs, if any, are stored apart.

The tables are those of the gguf package; kernels gather their words from a tensor behind the planes.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl
from gguf import quants


def grid(name: str) -> np.ndarray:
    """The grid of a format, (entries, 8 or 4) int8."""
    quant = getattr(quants, name)
    quant.init_grid()
    return quant.grid.reshape(quant.grid_shape).astype(np.int8)


def grid_words(name: str) -> np.ndarray:
    """The grid of a format as words of four bytes, int32."""
    return grid(name).view(np.int32).reshape(-1)


@triton.jit
def octet_words(codebook, index):
    """The entries (2, R, G) of a grid of 8 -> (2, R, G, 2) words.

    In this order of dimensions a thread gathers what belongs to its own group.
    """
    return tl.load(codebook + (index * 2)[:, :, :, None] + tl.arange(0, 2)[None, None, None, :])


@triton.jit
def octet_signs(signs):
    """The sign bits of octets (2, R, G), 8 each -> (2, R, G, 2), those of each word from its lowest bit up."""
    return signs[:, :, :, None] >> (tl.arange(0, 2) * 4)[None, None, None, :]


@triton.jit
def even_signs(bits):
    """7 sign bits -> 8, of which an even number is set."""
    bits &= 127
    folded = bits ^ (bits >> 4)
    return bits | ((0x6996 >> (folded & 15)) & 1) << 7  # bit n of the constant is the parity of n


@triton.jit
def negate(words, signs):
    """Words of four bytes, none zero, with the bytes negated whose bit is set among the lowest four of `signs`."""
    ones = ((signs & 15) * 0x00204081) & 0x01010101  # bit n moved to byte n
    return (words ^ (ones * 255)) + ones


@triton.jit
def group_words(words):
    """(2, R, G, 2) words of octets -> (R, G, 4)."""
    return tl.reshape(tl.permute(words, (1, 2, 0, 3)), (words.shape[1], words.shape[2], 4))
