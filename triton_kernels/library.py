"""Products with very many rows of activations: the weight is decoded in pieces, and the GPU's library multiplies.

With so many rows it is worth writing the weights down once, as float16, for the fastest float16 product there is.
"""

from __future__ import annotations

import torch

from trichord.triton_kernels.activations import Activations
from trichord.triton_kernels.formats import FORMATS
from trichord.triton_kernels.launch import launches
from trichord.triton_kernels.rows import half_rows
from trichord.weight_format import Weight


def suits_library(activations: Activations, weight: Weight) -> bool:
    """Whether this GPU multiplies so many rows of x faster by its library, if the operands may be float16."""
    least = launches().library_tokens
    return least is not None and activations.tokens >= least and not FORMATS[weight.format].wide


def library_product(activations: Activations, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """x (T, K) times the transposed weight (N, K) and its scale + bias (N,) -> (T, N) float32, from float16 operands.

    Products are summed in float32. The decoded rows take `Launches.library_bytes` at a time, or one row.
    """
    x, scales = activations.halves
    rows = weight.out_features
    step = max(1, min(rows, launches().library_bytes // (2 * x.shape[1])))
    y = activations.x.new_empty((activations.tokens, rows))
    decoded = x.new_empty((step, x.shape[1]))
    for first in range(0, rows, step):
        piece = half_rows(weight, first, decoded[: rows - first])
        _multiply(x, piece, y[:, first : first + step])
    factors = scales[:, None] * float(weight.scale)
    return y.mul_(factors) if bias is None else torch.addcmul(bias, y, factors, out=y)


def _multiply(x: torch.Tensor, weights: torch.Tensor, y: torch.Tensor) -> None:
    """y (T, N) float32, not necessarily contiguous = x (T, K) times the transposed weights (N, K), both float16."""
    if x.is_cuda:
        torch.mm(x, weights.T, out_dtype=torch.float32, out=y)
    else:  # in the interpreter: the products of float16 are exact in float32
        torch.mm(x.float(), weights.float().T, out=y)
