"""Activations of the feed-forward network, gated or not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trichord.cpu_fallback.jit import have_numba
from trichord.cpu_fallback.matmul import matmul
from trichord.weight_format import Weight


def activate(
    gate: torch.Tensor, up: torch.Tensor | None, activation: str, *, prepare: str | None = None
) -> torch.Tensor:
    """activation(gate) * up, elementwise (..., F) float32, contiguous; without `up` the activation alone.

    "silu" (with up: SwiGLU, Shazeer, 2020); "gelu", the tanh approximation, and "gelu_erf", the exact one (Hendrycks
    and Gimpel, 2016); "relu"; "relu_squared" (So et al., 2021); "swiglu_oai", that of gpt-oss:
    g * sigmoid(1.702 g) * (u + 1) with g = min(gate, 7), u = clamp(up, -7, 7). Rows may be strided: gate and up may be
    the halves of one product. There is nothing to `prepare`: the products round what they read themselves.
    """
    if not have_numba():
        return _activate(gate, up, activation)
    from trichord.cpu_fallback.token_kernels import activation_kernel

    output, width = torch.empty_like(gate, memory_format=torch.contiguous_format), gate.shape[-1]
    if gate.ndim != 2:
        gate, up = (None if tensor is None else tensor.reshape(-1, width) for tensor in (gate, up))
    up_place = (0, 0) if up is None else (up.data_ptr(), up.stride(0))
    places = gate.data_ptr(), gate.stride(0), *up_place, output.data_ptr()
    activation_kernel(activation)(gate.shape[0], width, *places, width)
    return output


def activated_matmul(
    x: torch.Tensor,
    weights: Sequence[Weight],
    precision: str,
    activation: str,
    biases: Sequence[torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """x (T, K) float32 times a gate and an up (F, K), or one alone -> what `activate` makes of the products (T, F)."""
    gate, *up = matmul(x, weights, precision, biases)
    return activate(gate, up[0] if up else None, activation)


def _activate(gate: torch.Tensor, up: torch.Tensor | None, activation: str) -> torch.Tensor:
    """The same by torch, in float64 since the tails of GELU need it."""
    x = gate.double()
    if activation == "silu":
        x = x * x.sigmoid()
    elif activation == "gelu":
        x = x * ((8 / np.pi) ** 0.5 * (x + 0.044715 * x**3)).sigmoid()
    elif activation == "gelu_erf":
        x = x * torch.erfc(x * -(0.5**0.5)) / 2
    elif activation == "swiglu_oai":
        x = x.clamp(max=7)
        x = x * (1.702 * x).sigmoid()
        up = None if up is None else up.clamp(-7, 7) + 1
    else:
        x = x.relu() ** {"relu": 1, "relu_squared": 2}[activation]
    return (x if up is None else x * up).float().contiguous()
