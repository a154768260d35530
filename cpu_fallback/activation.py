"""Gated activations of the feed-forward network."""

from __future__ import annotations

import numpy as np
import torch

from trichord.cpu_fallback.jit import have_numba


def activate(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """silu(gate) * up (T, F) float32, contiguous (Shazeer, 2020).

    Rows may be strided: gate and up may be the halves of one product.
    """
    tokens, width = gate.shape
    if not have_numba():
        x = gate.numpy()
        with np.errstate(over="ignore"):  # exp(-x) = infinity rightly gives 0
            return torch.from_numpy(x / (1 + np.exp(-x)) * up.numpy())
    from trichord.cpu_fallback.token_kernels import gate_up, gate_up_everywhere, over_tokens

    output = torch.empty((tokens, width), dtype=torch.float32)
    tensors = gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), output.data_ptr(), width
    over_tokens(gate_up, gate_up_everywhere, tokens, width, tensors)
    return output
