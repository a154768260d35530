"""Tile sizes, warps and pipeline stages of every product, as data: what to tune for a GPU is here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton

FEW_ROWS = 8  # rows of activations up to which the weights are streamed past them without tensor cores


@dataclass(frozen=True)
class GemvTile:
    """A program multiplies `rows` rows of the weight, `groups` groups at a time, by all rows of x.

    32 * warps groups give each thread one group of each row.
    """

    rows: int
    groups: int
    warps: int


@dataclass(frozen=True)
class GemmTile:
    """A program computes `rows` x `tokens` elements of the product, `columns` columns of the weight at a time."""

    rows: int
    tokens: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class RowsTile:
    """A program converts `rows` rows, `columns` columns at a time."""

    rows: int
    columns: int
    warps: int


@dataclass(frozen=True)
class Launches:
    """The tiles of one kind of device. A table goes by rows of x: its smallest entry that holds them all counts."""

    gemv: dict[int, GemvTile]
    gemm: dict[int, GemmTile]
    exact_gemm: dict[int, GemmTile]
    weights: RowsTile  # decoded to float32
    halves: RowsTile  # activations rounded to float16
    limb_groups: int  # groups of activations that a program rounds to limbs

    def gemv_tile(self, tokens: int, groups: int) -> GemvTile:
        """The tile for `tokens` rows of x and weights of `groups` groups a row."""
        tile = _smallest(self.gemv, tokens)
        fewer = triton.next_power_of_2(groups)
        return (
            replace(tile, groups=fewer, warps=max(1, tile.warps * fewer // tile.groups))
            if fewer < tile.groups
            else tile
        )

    def gemm_tile(self, tokens: int, exact: bool) -> GemmTile:
        """The tile for `tokens` rows of x, multiplied in float32 or from float16 operands."""
        return _smallest(self.exact_gemm if exact else self.gemm, tokens)


def _smallest(table: dict, tokens: int):
    return table[min((size for size in table if size >= tokens), default=max(table))]


_GPU = Launches(
    gemv={
        4: GemvTile(rows=4, groups=128, warps=4),
        8: GemvTile(rows=2, groups=128, warps=4),
    },
    gemm={
        16: GemmTile(rows=64, tokens=16, columns=128, warps=4, stages=3),
        32: GemmTile(rows=64, tokens=32, columns=128, warps=4, stages=3),
        64: GemmTile(rows=128, tokens=64, columns=64, warps=4, stages=3),
        128: GemmTile(rows=128, tokens=128, columns=64, warps=8, stages=3),
    },
    exact_gemm={
        16: GemmTile(rows=64, tokens=16, columns=32, warps=4, stages=2),
        64: GemmTile(rows=64, tokens=64, columns=32, warps=8, stages=2),
    },
    weights=RowsTile(rows=4, columns=1024, warps=4),
    halves=RowsTile(rows=1, columns=2048, warps=8),
    limb_groups=32,
)

# The interpreter runs programs one after another at a high price each.
_INTERPRETER = Launches(
    gemv={8: GemvTile(rows=128, groups=32, warps=1)},
    gemm={64: GemmTile(rows=128, tokens=64, columns=512, warps=1, stages=1)},
    exact_gemm={64: GemmTile(rows=128, tokens=64, columns=512, warps=1, stages=1)},
    weights=RowsTile(rows=64, columns=512, warps=1),
    halves=RowsTile(rows=64, columns=512, warps=1),
    limb_groups=1024,
)


def launches() -> Launches:
    """The tables for where the kernels run."""
    return _INTERPRETER if triton.knobs.runtime.interpret else _GPU
