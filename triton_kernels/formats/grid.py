"""Grids: codebooks of 8 or 4 small numbers an entry, whose signs, if any, are stored apart.

The tables are those of the gguf package; kernels gather from a tensor behind the planes. An index that the planes keep
whole and apart from the next is brought to its offset by a shift and a mask; that is why formats rearrange the bits of
theirs. The numbers of an octet are of three magnitudes. So its entry there is one word, half as much to gather as eight
bytes: nibble n is twice the rank of the n-th magnitude. With its sign in the lowest bit, a nibble indexes a table of 8
signed bytes.

The planes keep the signs of a group's four octets in one word, bit o of a nibble being that of octet o. Formats that
store 7 signs of 8, the last making their number even, have room for 4 other bits in place of the last nibble.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
import triton
import triton.language as tl
from gguf import quants

from trichord.triton_kernels.formats.fields import merge, spread
from trichord.triton_kernels.primitives import in_register, look_up_8


def _grid(name: str) -> np.ndarray:
    """The grid of a format, (entries, 8 or 4)."""
    quant = getattr(quants, name)
    quant.init_grid()
    return quant.grid.reshape(quant.grid_shape)


def grid_words(name: str) -> np.ndarray:
    """A grid of 4 as words of four bytes, int32."""
    return _grid(name).astype(np.int8).view(np.int32).reshape(-1)


def grid_codes(name: str) -> np.ndarray:
    """A grid of 8 as words of eight nibbles, int32: twice the rank of each number."""
    codes = 2 * np.unique(_grid(name), return_inverse=True)[1].reshape(-1, 8).astype(np.uint8)
    return (codes[:, ::2] | codes[:, 1::2] << 4).view(np.int32).reshape(-1)


def pair_words(pairs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """At most four pairs of signed bytes, what a code means without and with the lowest bit, as two words."""
    return struct.unpack("<2i", struct.pack(f"<{2 * len(pairs)}b", *chain(*pairs)).ljust(8, b"\0"))


IQ2_TABLE = tl.constexpr(pair_words([(8, -8), (25, -25), (43, -43)]))


def octet_bits(signs: torch.Tensor) -> torch.Tensor:
    """Bits of each octet and weight (..., 4, 8) -> the plane's (..., 4) bytes; weight n has nibble n."""
    return merge(signs.transpose(-1, -2).unflatten(-2, (4, 2)).flatten(-2), 1).flatten(-2)


def bits_of_octets(plane: torch.Tensor) -> torch.Tensor:
    """The inverse of `octet_bits`."""
    return spread(plane[..., None], 1).unflatten(-1, (2, 4)).flatten(-3, -2).transpose(-1, -2)


def quad_bits(signs: torch.Tensor) -> torch.Tensor:
    """`octet_bits` for grids of 4: weight n has nibble 2 * (n % 4) + n // 4, so that each byte has its own bits."""
    return octet_bits(signs.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2))


def bits_of_quads(plane: torch.Tensor) -> torch.Tensor:
    """The inverse of `quad_bits`."""
    return bits_of_octets(plane).unflatten(-1, (4, 2)).transpose(-1, -2).flatten(-2)


def with_eighth(packed: torch.Tensor) -> torch.Tensor:
    """GGML's words of four times 7 signs and 4 bits (..., 4) -> bits (..., 4, 8), the other 4 as the eighth ones."""
    bits = spread(packed[..., None], 1).flatten(-2)
    return torch.cat([bits[..., :28].unflatten(-1, (4, 7)), bits[..., 28:, None]], dim=-1)


def without_eighth(bits: torch.Tensor) -> torch.Tensor:
    """The inverse of `with_eighth`."""
    bits = torch.cat([bits[..., :7].flatten(-2), bits[..., 7]], dim=-1)
    return merge(bits.unflatten(-1, (4, 8)), 1).flatten(-2)


@triton.jit
def all_signs(signs):
    """The signs of octets that store 7, with the eighth instead of the other bits in the uppermost nibble."""
    known = signs & 0x0FFFFFFF
    parity = known ^ (known >> 16)
    parity ^= parity >> 8
    parity ^= parity >> 4
    return known | (parity << 28)


@triton.jit
def start_of(codebook, group):
    """Where a codebook begins, int64 in the shape (1, G), for `gather`: see `primitives.in_register`."""
    return codebook.to(tl.int64, bitcast=True) | (group >> 31).to(tl.int64)[None, :]


@triton.jit
def gather(start, offset):
    """The words at byte `offset`, a multiple of 4, of a codebook.

    It begins at a multiple of its length, so that the offset's bits need not be added but only set.
    """
    address = start | offset.to(tl.uint32, bitcast=True).to(tl.int64)
    return tl.load(address.to(tl.pointer_type(tl.int32), bitcast=True))


@triton.jit
def of_four(first, second, third, fourth):
    """Four tensors (R, G) -> (R, G, 4)."""
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (first.shape[0], first.shape[1], 4))


@triton.jit
def octet_words(start, offset, signs, group, TABLE: tl.constexpr):
    """The two words of entries (R, G) of a grid of 8, the lowest bit of each nibble flipped by `signs`."""
    codes = gather(start, offset) ^ (signs & 0x11111111)
    thread = group[None, :]
    return look_up_8(codes, (in_register(TABLE[0], thread), in_register(TABLE[1], thread)))


@triton.jit
def with_signs(words, signs, FIRST: tl.constexpr, INDEX: tl.constexpr):
    """Word INDEX, as an entry of a grid of 4 has it, of the half of a group whose signs begin at bit FIRST (0 or 2)."""
    ones = (signs >> (FIRST + (INDEX >> 1) + 4 * (INDEX & 1))) & 0x01010101
    return (words ^ (ones * 255)) + ones  # no byte is zero: none carries
