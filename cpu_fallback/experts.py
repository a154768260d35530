"""Products with the matrices of a mixture of experts: each token meets only those it was routed to."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from trichord.cpu_fallback.jit import have_numba
from trichord.cpu_fallback.matmul import most_rows_in_place, multiply_many, used_precision
from trichord.weight_format import Weight


def expert_matmul(
    x: torch.Tensor, weights: Sequence[Weight], experts: torch.Tensor, precision: str
) -> list[torch.Tensor]:
    """x (T, K) or (T, E, K) float32, experts (T, E) int32 -> [(T, E, N) float32 for each weight (X, N, K)].

    The (token, expert) pairs are sorted by expert, so that tokens with an expert in common share its decoded blocks.
    Experts with few pairs are multiplied in place, all of them and all weights in one parallel region; one with many
    is decoded by tiles. `Weight.scale` is not applied. Raises ValueError for an id that is no expert and
    for shapes that do not fit.
    """
    tokens, chosen = experts.shape
    for weight in weights:
        if x.shape[:-1] not in (experts.shape[:1], experts.shape) or x.shape[-1] != weight.in_features:
            raise ValueError(
                f"activations of shape {tuple(x.shape)} do not fit {chosen} experts for each of {tokens} tokens "
                f"and a weight of shape {weight.shape}"
            )
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    results = [torch.empty(tokens * chosen, weight.out_features) for weight in weights]
    if rows.numel() and chosen:
        work = functools.partial(_multiply, rows, weights, experts, precision, results, chosen if x.ndim == 2 else 1)
        if have_numba():
            from trichord.cpu_fallback.jobs import repeat

            repeat(work)
        else:
            work()
    return [y.view(tokens, chosen, y.shape[1]) for y in results]


def _multiply(
    rows: torch.Tensor,
    weights: Sequence[Weight],
    experts: torch.Tensor,
    precision: str,
    results: list[torch.Tensor],
    sharing: int,
) -> None:
    """rows (R, K) to the results (R * sharing, N), contiguous: `sharing` adjacent experts share one."""
    pairs, starts, counts = _by_expert(experts.numpy().reshape(-1), weights[0].shape[0], sharing)
    precisions = [used_precision(weight.format, precision) for weight in weights]
    limits = np.array([most_rows_in_place(w.format, used) for w, used in zip(weights, precisions, strict=True)])
    few = np.where(counts <= limits[:, None], counts, 0)
    if few.any():
        from trichord.cpu_fallback.in_place import multiply_paired

        multiply_paired(rows, list(zip(weights, precisions, results, strict=True)), pairs, starts, few)
    for expert in np.flatnonzero(counts > limits.min()):
        of_expert = torch.from_numpy(pairs[starts[expert] : starts[expert] + counts[expert]])
        many = [i for i, limit in enumerate(limits) if counts[expert] > limit]
        products = [torch.empty(len(of_expert), weights[i].out_features) for i in many]
        matrices = [(_matrix_of(weights[i], int(expert)), precisions[i]) for i in many]
        multiply_many(rows[of_expert[:, 0]], [(*m, y) for m, y in zip(matrices, products, strict=True)])
        for i, product in zip(many, products, strict=True):
            results[i][of_expert[:, 1]] = product


def _by_expert(ids: np.ndarray, experts: int, sharing: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of rows of x and y (see `in_place.multiply_paired`) by expert, each expert's first pair and its number.

    `sharing` adjacent ids share one row of x.
    """
    counts = np.bincount(ids, minlength=experts)  # refuses negative ids with a ValueError of its own
    if len(counts) > experts:
        raise ValueError(f"there is no expert {len(counts) - 1} among {experts}")
    pairs = np.empty((len(ids), 2), np.int64)
    pairs[:, 1] = np.argsort(ids, kind="stable")
    pairs[:, 0] = pairs[:, 1] // sharing
    return pairs, np.cumsum(counts) - counts, counts


def _matrix_of(weight: Weight, expert: int) -> Weight:
    rows = slice(expert * weight.out_features, (expert + 1) * weight.out_features)
    return Weight(weight.data[rows], weight.format, weight.shape[1:], weight.layout)
