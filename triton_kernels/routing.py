"""Which experts of a mixture a token goes to, and with which weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_SMALLEST_SUM = tl.constexpr(2.0**-14)  # float16's smallest normal number, as in llama.cpp
_TAKEN = tl.constexpr(-(2**63))  # below the key of every number


@triton.jit
def _keys(numbers, index):
    """int64 that order as the float32 numbers do, and where these are equal, the lower index above the higher."""
    bits = (numbers + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _index(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _number(key):
    order = (key >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def route_kernel(
    logits,
    bias,
    experts,
    weights,
    stride,
    width,
    scale,
    GATING: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COUNT: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_USED: tl.constexpr,
    BLOCK_COUNT: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """A token a program: see `route`. The experts are a tile of BLOCK_GROUPS groups of BLOCK_SIZE, with gaps."""
    token = tl.program_id(0).to(tl.int64)
    size = width // GROUPS
    group = tl.arange(0, BLOCK_GROUPS)
    member = tl.arange(0, BLOCK_SIZE)[None, :]
    expert = group[:, None] * size + member
    exists = (group[:, None] < GROUPS) & (member < size)
    scores = tl.load(logits + token * stride + expert, mask=exists, other=-float("inf"))
    if GATING == "softmax":
        scores = tl.exp(scores - tl.max(scores))
        scores /= tl.sum(scores)
    elif GATING == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-scores))
    ranks = scores
    if bias is not None:
        ranks += tl.load(bias + expert, mask=exists, other=0.0)
    keys = tl.where(exists, _keys(ranks, expert), _TAKEN)
    if GROUPS_USED < GROUPS:
        best = tl.max(keys, axis=1)
        second = tl.max(tl.where(keys == best[:, None], _TAKEN, keys), axis=1)
        group_keys = tl.where(group < GROUPS, _keys(_number(best) + _number(second), group), _TAKEN)
        used = group < 0
        for _ in range(GROUPS_USED):
            best_group = tl.max(group_keys)
            used |= group_keys == best_group
            group_keys = tl.where(used, _TAKEN, group_keys)
        keys = tl.where(used[:, None], keys, _TAKEN)
    place = tl.arange(0, BLOCK_COUNT)
    chosen = tl.zeros((BLOCK_COUNT,), tl.int32)
    factors = tl.full((BLOCK_COUNT,), -float("inf") if GATING == "softmax_of_chosen" else 0.0, tl.float32)
    for i in range(COUNT):
        best_key = tl.max(keys)
        chosen = tl.where(place == i, _index(best_key), chosen)
        score = tl.sum(tl.where(keys == best_key, scores, 0.0))
        factors = tl.where(place == i, score, factors)
        keys = tl.where(keys == best_key, _TAKEN, keys)
    if GATING == "softmax_of_chosen":
        factors = tl.exp(factors - tl.max(factors))
        factors /= tl.sum(factors)
    if NORMALIZE:
        factors /= tl.maximum(tl.sum(factors), _SMALLEST_SUM)
    tl.store(experts + token * COUNT + place, chosen, mask=place < COUNT)
    tl.store(weights + token * COUNT + place, factors * scale, mask=place < COUNT)


def route(
    logits: torch.Tensor,
    count: int,
    gating: str,
    bias: torch.Tensor | None = None,
    *,
    groups: int = 1,
    groups_used: int = 1,
    normalize: bool = False,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (T, X) float32 -> the `count` experts of each token (T, E) int32, best first, and their weights (T, E).

    Scores are the softmax or sigmoid of the logits, or the logits where the softmax is over the chosen. Choosing goes
    by score + bias (X,), of equal ones by the lower index, and within the `groups_used` of `groups` runs of adjacent
    experts whose two best have the largest sum (DeepSeek-V3, 2024). `normalize` divides the weights by their sum;
    `scale` multiplies them. Raises ValueError where there are not so many experts or groups.
    """
    tokens, width = logits.shape
    if groups > 1 and (width % groups or width < 2 * groups or not 1 <= groups_used <= groups):
        raise ValueError(f"{width} experts do not make {groups} groups of two or more, of which {groups_used} are used")
    if not 1 <= count <= width // groups * groups_used:
        raise ValueError(f"{count} experts cannot be chosen from {width // groups * groups_used}")
    experts = logits.new_empty((tokens, count), dtype=torch.int32)
    weights = logits.new_empty((tokens, count))
    if tokens:
        route_kernel[(tokens,)](
            logits,
            bias,
            experts,
            weights,
            logits.stride(0),
            width,
            scale,
            GATING=gating,
            NORMALIZE=normalize,
            COUNT=count,
            GROUPS=groups,
            GROUPS_USED=groups_used,
            BLOCK_COUNT=triton.next_power_of_2(count),
            BLOCK_GROUPS=triton.next_power_of_2(groups),
            BLOCK_SIZE=triton.next_power_of_2(width // groups),
            num_warps=1,
        )
    return experts, weights
