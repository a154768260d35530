"""Bit fields: codes of 1, 2 or 4 bits in bytes, and the scales beside them.

GGML and the planes use one arrangement. n codes fill m = n * bits / 8 bytes, and byte b holds codes b, b + m, b + 2m
and so on, from the lowest bits up; so one shift and one mask bring out the codes of consecutive weights in
consecutive bytes. GGML chooses n from 32 to 256, the planes take n = 32, a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def merge(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., n) uint8 codes below 2 ** bits -> (..., n * bits / 8) bytes."""
    parts = codes.unflatten(-1, (8 // bits, -1))
    merged = parts[..., 0, :].clone()
    for field in range(1, 8 // bits):
        merged |= parts[..., field, :] << (field * bits)
    return merged


def spread(merged: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `merge`: (..., m) bytes -> (..., m * 8 / bits) codes."""
    mask = (1 << bits) - 1
    return torch.cat([merged >> shift & mask for shift in range(0, 8, bits)], dim=-1)


def bits_of(data: torch.Tensor) -> torch.Tensor:
    """(..., n) bytes -> (..., 8n) bits, from the lowest of each byte up."""
    return spread(data[..., None], 1).flatten(-2)


def bytes_of(bits: torch.Tensor) -> torch.Tensor:
    """The inverse of `bits_of`."""
    return merge(bits.unflatten(-1, (-1, 8)), 1).squeeze(-1)


@triton.jit
def elements(plane, row, group, groups, SPAN: tl.constexpr, COUNT: tl.constexpr):
    """The COUNT elements that a plane keeps for every SPAN groups -> (R, G, COUNT)."""
    offset = (group // SPAN * COUNT)[None, :, None] + tl.arange(0, COUNT)[None, None, :]
    return tl.load(plane + (row * (groups // SPAN * COUNT))[:, None, None] + offset)


@triton.jit
def words(plane, row, group, groups, BITS: tl.constexpr, AT: tl.constexpr = 0):
    """Codes 0..15 and 16..31 of each group, from a plane of BITS int32 a group: two (R, G, 4) int32.

    A byte holds one code, shifted left by AT, from 0 to 4.
    """
    MASK: tl.constexpr = 0x01010101 * (((1 << BITS) - 1) << AT)
    codes = elements(plane, row, group, groups, 1, BITS)[:, :, None, :]
    shift = (tl.arange(0, 4 // BITS) * BITS)[None, None, :, None]
    shape: tl.constexpr = (row.shape[0], group.shape[0], 4)
    low = ((codes << AT) >> shift) & MASK  # what falls off on the left belongs to the high codes
    high = (codes >> (shift + (4 - AT))) & MASK
    return tl.reshape(low, shape), tl.reshape(high, shape)
