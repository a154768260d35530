"""Mixtures of experts: the pairs of a token and an expert, sorted by expert without asking the device how many."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def sort_kernel(experts, order, tiles, pairs, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """One expert a program: the numbers of its pairs in `order` (pairs,), and its tiles of up to TILE of them.

    A tile is (expert, first, end), int32: it covers order[first : min(first + TILE, end)]. Expert e's begin at tile
    (first pair of e) // TILE + e, which leaves each at least as many as it fills; those left over are empty.
    """
    expert = tl.program_id(0)
    position = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.int32)
    own = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, pairs, BLOCK):
        ids = tl.load(experts + start + position, mask=start + position < pairs, other=2147483647)
        before += (ids < expert).to(tl.int32)
        own += (ids == expert).to(tl.int32)
    first = tl.sum(before)
    end = first + tl.sum(own)
    first_tile = first // TILE + expert
    for tile in range(first_tile, end // TILE + expert + 1, BLOCK):
        number = tile + position
        inside = number < end // TILE + expert + 1
        tl.store(tiles + number * 3, expert, mask=inside)
        tl.store(tiles + number * 3 + 1, first + (number - first_tile) * TILE, mask=inside)
        tl.store(tiles + number * 3 + 2, end, mask=inside)
    if end > first:
        for start in range(0, pairs, BLOCK):
            ids = tl.load(experts + start + position, mask=start + position < pairs, other=2147483647)
            match = (ids == expert).to(tl.int32)
            tl.store(order + first + tl.cumsum(match, 0) - 1, start + position, mask=match > 0)
            first += tl.sum(match)


class Pairs:
    """The pairs of each token and its experts, numbered token by token: their rows of x, and their order by expert."""

    def __init__(self, experts: torch.Tensor, experts_in_all: int, sharing: int) -> None:
        """experts (T, E) int32 below `experts_in_all`; `sharing` adjacent pairs share a row of x."""
        self.experts = experts.contiguous()
        self.count, self.experts_in_all, self.sharing = experts.numel(), experts_in_all, sharing
        self._tiles: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def few(self) -> bool:
        """Whether so few experts are chosen twice that it is best to read a matrix for each pair."""
        return len(self.experts) == 1 or 2 * self.count <= self.experts_in_all

    @property
    def of_an_expert(self) -> int:
        """How many pairs an expert has on average."""
        return -(-self.count // self.experts_in_all)

    def tiles(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The pairs ordered by expert (pairs,) and the tiles (as many as there may be, 3): see `sort_kernel`."""
        if size not in self._tiles:
            order = torch.empty_like(self.experts)
            tiles = self.experts.new_empty((self.count // size + self.experts_in_all, 3))
            sort_kernel[(self.experts_in_all,)](self.experts, order, tiles, self.count, TILE=size, BLOCK=_BLOCK)
            self._tiles[size] = order, tiles
        return self._tiles[size]
