"""The product of activations and packed weights: which kernel serves which case."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Literal

import torch

from trichord.triton_kernels.activations import LIMBS, Activations
from trichord.triton_kernels.experts import Pairs
from trichord.triton_kernels.formats import FORMATS
from trichord.triton_kernels.gemm import gemm
from trichord.triton_kernels.gemv import gemv
from trichord.triton_kernels.launch import FEW_ROWS
from trichord.triton_kernels.library import library_product, suits_library
from trichord.weight_format import Weight


def matmul(
    x: torch.Tensor | Activations,
    weights: Sequence[Weight],
    precision: Literal["exact", "default", "fast"],
    biases: Sequence[torch.Tensor | None] | None = None,
) -> list[torch.Tensor]:
    """x (T, K) float32, contiguous, on the weights' device -> [x @ W.T (T, N) float32 for each weight (N, K)].

    Each product is multiplied by `Weight.scale`, and its bias (N,) float32 added, if it has one. x may have been
    prepared, by `norm`, `activate` or `attention`.

    "exact" multiplies in float32, and so do weights of 32 bits and more at any precision. Otherwise, up to FEW_ROWS
    rows of x, weights in an integer format meet activations rounded to 16 bits ("default") or 8 bits ("fast") a group
    of 32, and those in a float format are multiplied in float32; with more rows the operands are float16. With very
    many, the weight is decoded for the GPU's library, a limited number of its rows at a time.
    Raises ValueError for shapes, dtypes and formats that do not fit.
    """
    activations = Activations.of(x)
    if activations.x.ndim != 2:
        raise ValueError(f"activations must be (T, K), not of shape {tuple(activations.x.shape)}")
    for weight in weights:
        check(activations.x, weight, 2)
    return _products(activations, weights, precision, biases or [None] * len(weights))


def expert_matmul(
    x: torch.Tensor | Activations,
    weights: Sequence[Weight],
    experts: torch.Tensor,
    precision: Literal["exact", "default", "fast"],
) -> list[torch.Tensor]:
    """x (T, K) or (T, E, K) float32, contiguous, experts (T, E) int32 -> [(T, E, N) for each weight (X, N, K)].

    Row t of x, or row e of it, meets the matrix of expert experts[t, e], which must be below X. Precision is that of
    `matmul`, where few rows are few pairs of a token and an expert. `Weight.scale` is not applied. Nothing waits for
    the device. Raises ValueError for shapes, dtypes and formats that do not fit.
    """
    activations = Activations.of(x)
    for weight in weights:
        check(activations.x, weight, 3)
    shape = activations.x.shape
    if shape[:-1] not in (experts.shape[:1], experts.shape):
        raise ValueError(f"activations of shape {tuple(shape)} do not fit experts of shape {tuple(experts.shape)}")
    pairs = Pairs(experts, weights[0].shape[0], experts.shape[1] if len(shape) == 2 else 1)
    return [
        y.unflatten(0, experts.shape) for y in _products(activations, weights, precision, [None] * len(weights), pairs)
    ]


def check(x: torch.Tensor, weight: Weight, dimensions: int) -> None:
    """Raises ValueError where x (..., K) cannot meet a weight of so many dimensions."""
    if x.dtype != torch.float32 or not x.is_contiguous():
        raise ValueError(f"activations must be contiguous float32, not {x.dtype} of shape {tuple(x.shape)}")
    if len(weight.shape) != dimensions or weight.in_features != x.shape[-1]:
        raise ValueError(f"activations of shape {tuple(x.shape)} do not fit a weight of shape {weight.shape}")
    if weight.format not in FORMATS:
        raise ValueError(f"no kernel multiplies by weights in {weight.format.name}")


def streams(weight: Weight, precision: str) -> bool:
    """Whether few rows of x are multiplied by this weight without tensor cores."""
    return precision != "exact" or not FORMATS[weight.format].integer


def _products(
    activations: Activations,
    weights: Sequence[Weight],
    precision: str,
    biases: Sequence[torch.Tensor | None],
    pairs: Pairs | None = None,
) -> list[torch.Tensor]:
    results, few = (activations.tokens, activations.tokens <= FEW_ROWS) if pairs is None else (pairs.count, pairs.few)
    if results == 0:
        return [activations.x.new_empty((0, weight.out_features)) for weight in weights]
    exact = precision == "exact"
    streamed = [few and streams(weight, precision) for weight in weights]
    members, their_biases = (list(compress(each, streamed)) for each in (weights, biases))
    few_rows = gemv(activations, members, their_biases, LIMBS.get(precision, 0), pairs)
    return [
        few_rows.pop(0) if by_gemv else _many_rows(activations, weight, bias, exact, pairs)
        for weight, bias, by_gemv in zip(weights, biases, streamed, strict=True)
    ]


def _many_rows(
    activations: Activations, weight: Weight, bias: torch.Tensor | None, exact: bool, pairs: Pairs | None
) -> torch.Tensor:
    # How many rows an expert gets only the device knows: the library would have to wait for it.
    if pairs is None and not exact and suits_library(activations, weight):
        return library_product(activations, weight, bias)
    return gemm(activations, weight, bias, exact or FORMATS[weight.format].wide, pairs)
