"""The product of activations and packed weights: which kernel serves which case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from trichord.triton_kernels.activations import Activations
from trichord.triton_kernels.formats import FORMATS
from trichord.triton_kernels.gemm import gemm
from trichord.triton_kernels.gemv import gemv
from trichord.triton_kernels.launch import FEW_ROWS
from trichord.weight_format import Weight

_LIMBS = {"default": 2, "fast": 1}  # bytes that activations are rounded to for integer products


def matmul(
    x: torch.Tensor, weights: Sequence[Weight], precision: Literal["exact", "default", "fast"]
) -> list[torch.Tensor]:
    """x (T, K) float32, contiguous, on the weights' device -> [x @ W.T (T, N) float32 for each weight (N, K)].

    "exact" multiplies in float32, and so do weights of 32 bits and more at any precision. Otherwise, up to FEW_ROWS
    rows of x, weights in an integer format meet activations rounded to 16 bits ("default") or 8 bits ("fast") a group
    of 32, and those in a float format are multiplied in float32; with more rows the operands are float16.
    `Weight.scale` is not applied.
    Raises ValueError for shapes, dtypes and formats that do not fit.
    """
    if x.ndim != 2 or x.dtype != torch.float32 or not x.is_contiguous():
        raise ValueError(f"activations must be contiguous float32 (T, K), not {x.dtype} of shape {tuple(x.shape)}")
    for weight in weights:
        if len(weight.shape) != 2 or weight.in_features != x.shape[1]:
            raise ValueError(f"activations of shape {tuple(x.shape)} do not fit a weight of shape {weight.shape}")
        if weight.format not in FORMATS:
            raise ValueError(f"no kernel multiplies by weights in {weight.format.name}")
    activations = Activations(x)
    return [_product(activations, weight, precision) for weight in weights]


def _product(activations: Activations, weight: Weight, precision: str) -> torch.Tensor:
    format = FORMATS[weight.format]
    if activations.tokens == 0:
        return activations.x.new_empty((0, weight.rows))
    exact = precision == "exact"
    if activations.tokens <= FEW_ROWS and not (exact and format.integer):
        return gemv(activations, format, weight.data, weight.rows, _LIMBS.get(precision, 0))
    return gemm(activations, format, weight.data, weight.rows, exact or format.wide)
