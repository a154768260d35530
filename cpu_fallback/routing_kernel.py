"""The choice of experts in Numba, token by token."""

from __future__ import annotations

import numpy as np

from trichord.cpu_fallback.jit import compiled
from trichord.cpu_fallback.native import exp, floats, integers


@compiled
def _softmax(numbers):  # type: ignore[no-untyped-def]
    largest, total = numbers.max(), np.float32(0.0)
    for i in range(len(numbers)):
        numbers[i] = exp(numbers[i] - largest)
        total += numbers[i]
    for i in range(len(numbers)):
        numbers[i] /= total


@compiled
def _best(numbers, taken):  # type: ignore[no-untyped-def]
    """The first of the largest numbers that are not taken."""
    best = -1
    for i in range(len(numbers)):
        if not taken[i] and (best < 0 or numbers[i] > numbers[best]):
            best = i
    return best


@compiled
def _take_other_groups(ranks, taken, groups, groups_used):  # type: ignore[no-untyped-def]
    """Marks the experts outside of the `groups_used` groups whose two largest ranks have the largest sum."""
    size = len(ranks) // groups
    sums, used = np.empty(groups, np.float32), np.zeros(groups, np.bool_)
    for group in range(groups):
        members, passed = ranks[group * size : (group + 1) * size], np.zeros(size, np.bool_)
        first = _best(members, passed)
        passed[first] = True
        sums[group] = members[first] + members[_best(members, passed)]
    for _ in range(groups_used):
        used[_best(sums, used)] = True
    for expert in range(len(ranks)):
        taken[expert] = not used[expert // size]


@compiled
def choose(tensors, geometry, gating, smallest_sum, scale):  # type: ignore[no-untyped-def]
    """tensors: logits, bias (0: none), experts, weights; geometry: tokens, stride of logits, their experts, how many
    to choose, groups, groups used; gating: 0 softmax, 1 sigmoid, 2 softmax of the chosen.

    The weights are divided by their sum, which counts as at least `smallest_sum`, where that is not 0.
    """
    logits, bias, experts, weights = tensors
    tokens, stride, width, count, groups, groups_used = geometry
    scores, taken = np.empty(width, np.float32), np.empty(width, np.bool_)
    for token in range(tokens):
        scores[:] = floats(logits + 4 * token * stride, width)
        if gating == 0:
            _softmax(scores)
        elif gating == 1:
            for i in range(width):
                scores[i] = np.float32(1.0) / (np.float32(1.0) + exp(-scores[i]))
        ranks = scores
        if bias:
            ranks = scores + floats(bias, width)
        taken[:] = False
        if groups_used < groups:
            _take_other_groups(ranks, taken, groups, groups_used)
        chosen, of_chosen = integers(experts + 4 * token * count, count), floats(weights + 4 * token * count, count)
        for i in range(count):
            chosen[i] = _best(ranks, taken)
            taken[chosen[i]] = True
            of_chosen[i] = scores[chosen[i]]
        if gating == 2:
            _softmax(of_chosen)
        factor = np.float32(scale)
        if smallest_sum:
            factor /= max(of_chosen.sum(), np.float32(smallest_sum))
        for i in range(count):
            of_chosen[i] *= factor
