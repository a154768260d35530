"""Which experts of a mixture a token goes to, and with which weights."""

from __future__ import annotations

import numpy as np
import torch

from trichord.cpu_fallback.jit import have_numba

_GATINGS = ("softmax", "sigmoid", "softmax_of_chosen")
_SMALLEST_SUM = 2.0**-14
"""What weights are divided by where their sum is smaller: float16's smallest normal number, as in llama.cpp."""


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
    _check(width, count, groups, groups_used)
    smallest_sum = _SMALLEST_SUM if normalize else 0.0
    if not have_numba():
        chosen, weights = _choose(logits.numpy(), bias, count, gating, groups, groups_used)
        if normalize:
            weights /= np.maximum(weights.sum(1, keepdims=True), _SMALLEST_SUM)
        return torch.from_numpy(chosen.astype(np.int32)), torch.from_numpy(weights * np.float32(scale))
    from trichord.cpu_fallback.jobs import repeat
    from trichord.cpu_fallback.routing_kernel import choose

    experts, weights = torch.empty((tokens, count), dtype=torch.int32), torch.empty((tokens, count))
    tensors = logits.data_ptr(), 0 if bias is None else bias.data_ptr(), experts.data_ptr(), weights.data_ptr()
    geometry = tokens, logits.stride(0), width, count, groups, groups_used
    repeat(lambda: choose(tensors, geometry, _GATINGS.index(gating), smallest_sum, scale))
    return experts, weights


def _check(width: int, count: int, groups: int, groups_used: int) -> None:
    if groups > 1 and (width % groups or width < 2 * groups or not 1 <= groups_used <= groups):
        raise ValueError(f"{width} experts do not make {groups} groups of two or more, of which {groups_used} are used")
    if not 1 <= count <= width // groups * groups_used:
        raise ValueError(f"{count} experts cannot be chosen from {width // groups * groups_used}")


def _choose(
    logits: np.ndarray, bias: torch.Tensor | None, count: int, gating: str, groups: int, groups_used: int
) -> tuple[np.ndarray, np.ndarray]:
    """In NumPy: the chosen experts and their weights, before these are normalised."""
    with np.errstate(over="ignore"):  # exp(-x) = infinity rightly gives 0
        scores = {"softmax": _softmax, "sigmoid": lambda x: 1 / (1 + np.exp(-x))}.get(gating, np.copy)(logits)
    ranks = scores if bias is None else scores + bias.numpy()
    if groups_used < groups:
        grouped = ranks.reshape(len(ranks), groups, -1)
        sums = np.sort(grouped, axis=2)[:, :, -2:].sum(2)
        rest = np.argsort(-sums, axis=1, kind="stable")[:, groups_used:]
        masked = grouped.copy()
        np.put_along_axis(masked, rest[:, :, None], -np.inf, axis=1)
        ranks = masked.reshape(ranks.shape)
    chosen = np.argsort(-ranks, axis=1, kind="stable")[:, :count]
    weights = np.take_along_axis(scores, chosen, axis=1)
    return chosen, _softmax(weights) if gating == "softmax_of_chosen" else weights


def _softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)
