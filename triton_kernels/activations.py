"""Activations in the forms that the products take, each prepared once for all the products that read them.

A kernel that computes activations may round them itself (`store_limbs`), which saves a launch.
"""

from __future__ import annotations

from functools import cached_property

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.dependent import await_predecessor, dependent_launch
from trichord.triton_kernels.launch import FEW_ROWS, launches

LIMBS = {"default": 2, "fast": 1}
"""Bytes that activations are rounded to for integer products, by precision; in any other they are float32."""


@triton.jit
def store_limbs(values, group, valid, limbs, LIMBS: tl.constexpr):
    """Rounds groups (G, 32) of float32 to integers n: x = scale * n, with a scale for each group; `group` is (G, 1).

    With two limbs |n| <= 32639 = 127 * 257, and n = 256 * first + second where both are signed bytes; with one limb
    |n| <= 127. `limbs` is where to: limbs (groups, LIMBS, 32) int8, scales (groups,) and the sums of n over the halves
    of each group (groups, 2) int32. A group with an element that is not finite has a scale that is not finite.
    """
    codes, scales, sums = limbs
    LIMIT: tl.constexpr = 127 * 257 if LIMBS == 2 else 127
    element = tl.arange(0, 32)[None, :]
    largest = tl.max(tl.abs(values), axis=1, keep_dims=True)
    scale = largest / LIMIT + tl.sum(values * 0.0, axis=1, keep_dims=True)  # tl.max passes over NaN, the sum does not
    normal = scale >= 1.1754944e-38  # false for NaN, and where the quotient below would be too large
    # Adding 1.5 * 2^23 rounds to an integer, ties to even; no operation of Triton does that on every target.
    quotients = tl.where(normal, values / tl.where(normal, scale, 1.0), 0.0)
    integers = ((quotients + 12582912.0) - 12582912.0).to(tl.int32)
    tl.store(scales + group, scale, mask=valid)
    halves = tl.sum(tl.reshape(integers, (values.shape[0], 2, 16)), axis=2)
    tl.store(sums + group * 2 + tl.arange(0, 2)[None, :], halves, mask=valid)
    if LIMBS == 2:
        second = ((integers + 128) & 255) - 128
        tl.store(codes + group * 64 + element, ((integers - second) >> 8).to(tl.int8), mask=valid)
        tl.store(codes + group * 64 + 32 + element, second.to(tl.int8), mask=valid)
    else:
        tl.store(codes + group * 32 + element, integers.to(tl.int8), mask=valid)


@triton.jit
def limb_kernel(x, limbs, groups, LIMBS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, PDL: tl.constexpr):
    """Rounds BLOCK_GROUPS of the groups of 32 of x float32: see `store_limbs`."""
    group = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)[:, None]
    valid = group < groups
    await_predecessor(PDL)
    values = tl.load(x + group * 32 + tl.arange(0, 32)[None, :], mask=valid, other=0.0)
    store_limbs(values, group, valid, limbs, LIMBS)


@triton.jit
def half_kernel(x, halves, scales, tokens, columns, stride, BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """BLOCK_TOKENS rows of x (T, K) float32 -> float16 (T, stride) times powers of two, their inverses in scales (T,).

    The largest magnitude of a row comes to lie in [2^14, 2^15). Each 16 columns are in the order of
    `tile.fragment_order`: position 8c + 2j + d holds column 4j + 2d + c. Columns from K to stride are zero.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    valid = token < tokens
    x += token * columns
    halves += token * stride
    position = tl.arange(0, BLOCK_COLUMNS)[None, :]
    largest = tl.zeros((BLOCK_TOKENS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + position
        largest = tl.maximum(largest, tl.abs(tl.load(x + column, mask=valid & (column < columns), other=0.0)))
    exponent = tl.max(largest, axis=1, keep_dims=True).to(tl.int32, bitcast=True) >> 23  # with float32's bias of 127
    exponent = tl.minimum(268 - exponent, 253)
    factor = (exponent << 23).to(tl.float32, bitcast=True)
    tl.store(scales + token, ((254 - exponent) << 23).to(tl.float32, bitcast=True), mask=valid)
    source = (position & -16) + (position & 6) * 2 + (position & 1) * 2 + ((position >> 3) & 1)
    for start in range(0, stride, BLOCK_COLUMNS):
        values = tl.load(x + start + source, mask=valid & (start + source < columns), other=0.0)
        column = start + position
        tl.store(halves + column, (values * factor).to(tl.float16), mask=valid & (column < stride))


Limbs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Activations:
    """x (..., K) float32, contiguous, and what has been made of it so far, for all the products that read it."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x
        self.columns = x.shape[-1]
        self.tokens = x.numel() // self.columns
        self._limbs: dict[int, Limbs] = {}

    @classmethod
    def of(cls, x: torch.Tensor | Activations) -> Activations:
        """x itself, where it is already more than a tensor."""
        return x if isinstance(x, cls) else cls(x)

    def __len__(self) -> int:
        return len(self.x)

    def limbs(self, count: int) -> Limbs:
        """`count` (1 or 2) limbs as words (T, groups, count * 8) int32, scales and sums: see `store_limbs`."""
        if count not in self._limbs:
            limbs = self.new_limbs(count)
            total, block = limbs[1].numel(), launches().limb_groups
            limb_kernel[(triton.cdiv(total, block),)](
                self.x, limbs, total, LIMBS=count, BLOCK_GROUPS=block, enable_fp_fusion=True, **dependent_launch()
            )
        codes, scales, sums = self._limbs[count]
        return codes.view(torch.int32), scales, sums

    def new_limbs(self, count: int) -> Limbs:
        """Memory for `count` limbs of each element, int8, with their scales and sums: the caller's kernel fills it."""
        groups = self.columns // 32
        self._limbs[count] = (
            self.x.new_empty((self.tokens, groups, count * 32), dtype=torch.int8),
            self.x.new_empty((self.tokens, groups)),
            self.x.new_empty((self.tokens, groups, 2), dtype=torch.int32),
        )
        return self._limbs[count]

    def wanted_limbs(self, precision: str | None) -> int:
        """How many limbs the kernel that writes x had better write beside it for products in this precision."""
        few = len(self) <= FEW_ROWS and self.columns % 32 == 0
        return LIMBS.get(precision, 0) if few else 0

    @cached_property
    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float16 rows (T, K rounded up to 16) and the factor of each that restores it: see `half_kernel`."""
        stride = -(-self.columns // 16) * 16
        halves = self.x.new_empty((self.tokens, stride), dtype=torch.float16)
        scales = self.x.new_empty(self.tokens)
        tile = launches().halves
        half_kernel[(triton.cdiv(self.tokens, tile.rows),)](
            self.x,
            halves,
            scales,
            self.tokens,
            self.columns,
            stride,
            BLOCK_TOKENS=tile.rows,
            BLOCK_COLUMNS=tile.columns,
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )
        return halves, scales
