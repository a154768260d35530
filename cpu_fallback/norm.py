"""RMS normalisation of the residual stream, with the residual's addition."""

from __future__ import annotations

import numpy as np
import torch

from trichord.cpu_fallback.jit import have_numba


def norm(
    residual: torch.Tensor, gain: torch.Tensor, epsilon: float, delta: torch.Tensor | None = None
) -> torch.Tensor:
    """residual (T, K) float32 += delta, in place; returns residual / rms(residual) * gain (T, K), contiguous.

    rms(x) = sqrt(mean(x²) + epsilon) (Zhang and Sennrich, 2019). Rows may be strided, elements of a row may not.
    """
    tokens, width = residual.shape
    if not have_numba():
        if delta is not None:
            residual += delta
        x = residual.numpy()
        scale = 1 / np.sqrt(np.square(x, dtype=np.float64).mean(axis=1, keepdims=True) + epsilon)
        return torch.from_numpy(x * scale.astype(np.float32) * gain.numpy())
    from trichord.cpu_fallback.token_kernels import normalize, normalize_everywhere, over_tokens

    output = torch.empty((tokens, width), dtype=torch.float32)
    added = (0, 0) if delta is None else (delta.data_ptr(), delta.stride(0))
    tensors = residual.data_ptr(), residual.stride(0), *added, gain.data_ptr(), output.data_ptr(), width
    over_tokens(normalize, normalize_everywhere, tokens, width, tensors, epsilon)
    return output
