"""Tile sizes, warps and pipeline stages of the products, as data: what to tune for a GPU is here and nowhere else.

The interpreter runs programs one after another at a high price each, so its table has large tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton

FEW_ROWS = 8  # rows of activations up to which the weights are streamed past them without tensor cores


@dataclass(frozen=True)
class FewRowsTile:
    """A program multiplies `rows` rows of the weight, `groups` groups at a time, by all rows of x.

    32 * warps groups give each thread one group of each row.
    """

    rows: int
    groups: int
    warps: int


@dataclass(frozen=True)
class ManyRowsTile:
    """A program computes `rows` x `tokens` elements of the product, `columns` of the weight at a time."""

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


_FEW_ROWS = {
    1: FewRowsTile(rows=4, groups=128, warps=4),
    2: FewRowsTile(rows=4, groups=128, warps=4),
    4: FewRowsTile(rows=4, groups=128, warps=4),
    8: FewRowsTile(rows=2, groups=128, warps=4),
}
_MANY_ROWS = {
    16: ManyRowsTile(rows=64, tokens=16, columns=128, warps=4, stages=3),
    32: ManyRowsTile(rows=64, tokens=32, columns=128, warps=4, stages=3),
    64: ManyRowsTile(rows=128, tokens=64, columns=64, warps=4, stages=3),
    128: ManyRowsTile(rows=128, tokens=128, columns=64, warps=8, stages=3),
}
_MANY_ROWS_EXACT = {
    16: ManyRowsTile(rows=64, tokens=16, columns=32, warps=4, stages=2),
    64: ManyRowsTile(rows=64, tokens=64, columns=32, warps=4, stages=2),
}
_ROWS = RowsTile(rows=4, columns=1024, warps=4)
_HALVES = RowsTile(rows=1, columns=2048, warps=8)
_LIMB_GROUPS = 32
_INTERPRETER_FEW_ROWS = FewRowsTile(rows=128, groups=32, warps=1)
_INTERPRETER_MANY_ROWS = ManyRowsTile(rows=128, tokens=64, columns=512, warps=1, stages=1)
_INTERPRETER_ROWS = RowsTile(rows=64, columns=512, warps=1)
_INTERPRETER_LIMB_GROUPS = 1024


def few_rows_tile(tokens: int, groups: int) -> FewRowsTile:
    """The tile for `tokens` (1, 2, 4 or 8) rows of x and weights of `groups` groups a row."""
    tile = _INTERPRETER_FEW_ROWS if triton.knobs.runtime.interpret else _FEW_ROWS[tokens]
    if groups >= tile.groups:
        return tile
    fewer = triton.next_power_of_2(groups)
    return replace(tile, groups=fewer, warps=max(1, tile.warps * fewer // tile.groups))


def many_rows_tile(tokens: int, exact: bool) -> ManyRowsTile:
    """The tile for any number of rows of x: the smallest that holds them all, or else the largest."""
    if triton.knobs.runtime.interpret:
        return _INTERPRETER_MANY_ROWS
    table = _MANY_ROWS_EXACT if exact else _MANY_ROWS
    return table[min((size for size in table if size >= tokens), default=max(table))]


def rows_tile() -> RowsTile:
    """The tile for weights as floats."""
    return _INTERPRETER_ROWS if triton.knobs.runtime.interpret else _ROWS


def half_tile() -> RowsTile:
    """The tile for activations as float16."""
    return _INTERPRETER_ROWS if triton.knobs.runtime.interpret else _HALVES


def limb_groups() -> int:
    """Groups of activations that one program rounds to limbs."""
    return _INTERPRETER_LIMB_GROUPS if triton.knobs.runtime.interpret else _LIMB_GROUPS
