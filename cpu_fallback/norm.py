"""Normalisation of the residual stream, or of heads, with the residual's addition."""

from __future__ import annotations

import numpy as np
import torch

from trichord.cpu_fallback.jit import have_numba


def norm(
    residual: torch.Tensor,
    gain: torch.Tensor | None,
    epsilon: float,
    delta: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    centered: bool = False,
    prepare: str | None = None,
) -> torch.Tensor:
    """residual (T, K) float32 += delta, in place; returns its normalised rows (T, K) * gain + bias, contiguous.

    A row is divided by sqrt(mean(x²) + epsilon) (RMS norm: Zhang and Sennrich, 2019), or, `centered`, by
    sqrt(variance + epsilon) after its mean is subtracted (layer norm: Ba et al., 2016). gain and bias, contiguous, are
    (K,), or (M, K) where row t takes line t % M. residual and delta may be (T, H, D): then each head is a row, row
    t * H + h, and so is the result's. Only the elements of a row must be adjacent. There is nothing to `prepare`: the
    products round what they read themselves.
    """
    if not have_numba():
        return _norm(residual, gain, epsilon, delta, bias, centered)
    from trichord.cpu_fallback.token_kernels import normalize

    output = torch.empty_like(residual, memory_format=torch.contiguous_format)
    *leading, width = residual.shape
    heads = leading[1] if len(leading) == 2 else 1
    tensors = *_place(residual), *_place(delta), *_lines(gain), *_lines(bias), output.data_ptr()
    normalize(leading[0] * heads, width, *tensors, heads, width, centered, epsilon)
    return output


def _place(x: torch.Tensor | None) -> tuple[int, int, int]:
    """Address, and elements from a token to the next and from a head to the next."""
    if x is None:
        return 0, 0, 0
    return x.data_ptr(), x.stride(0), x.stride(1) if x.ndim == 3 else 0


def _lines(x: torch.Tensor | None) -> tuple[int, int]:
    """Address and count of the lines of a gain or bias."""
    if x is None:
        return 0, 1
    return x.data_ptr(), x.shape[0] if x.ndim == 2 else 1


def _norm(
    residual: torch.Tensor,
    gain: torch.Tensor | None,
    epsilon: float,
    delta: torch.Tensor | None,
    bias: torch.Tensor | None,
    centered: bool,
) -> torch.Tensor:
    """The same by NumPy."""
    if delta is not None:
        residual += delta
    x = residual.numpy().reshape(-1, residual.shape[-1]).astype(np.float64)
    if centered:
        x -= x.mean(axis=1, keepdims=True)
    x /= np.sqrt(np.square(x).mean(axis=1, keepdims=True) + epsilon)
    for lines, apply in ((gain, np.multiply), (bias, np.add)):
        if lines is not None:
            repeated = lines.numpy().reshape(-1, x.shape[1])
            apply(x, repeated[np.arange(len(x)) % len(repeated)], out=x)
    return torch.from_numpy(x.astype(np.float32)).view(residual.shape)
