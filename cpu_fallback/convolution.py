"""Short causal convolution along each sequence, which carries the last inputs from call to call."""

from __future__ import annotations

import numpy as np
import torch

from trichord.cpu_fallback.activation import activate
from trichord.cpu_fallback.jit import have_numba


def short_convolution(
    x: torch.Tensor,
    kernel: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    state_slots: torch.Tensor,
    query_starts: torch.Tensor,
    activation: str | None,
) -> torch.Tensor:
    """Causal depthwise convolution: x (T, C), kernel (C, W), bias (C,) -> (T, C) contiguous; all float32.

    y[t] = bias + sum over w of kernel[:, w] * x[t - W + 1 + w], then the activation (a name of `activate`) where there
    is one. Sequence s owns the rows query_starts[s]:query_starts[s+1] (query_starts (S+1,) int32); inputs before them
    come from states[state_slots[s]] (states (B, C, W - 1), state_slots (S,) int64), oldest first, which become the
    sequence's last W - 1 inputs. The rows of x and the slots may be strided, the rest is contiguous.
    """
    tokens, channels = x.shape
    width = kernel.shape[1]
    if not have_numba():
        output = torch.from_numpy(_convolve(x, kernel, bias, states, state_slots, query_starts))
    else:
        from trichord.cpu_fallback.state_kernels import CHANNELS, convolve

        output = torch.empty((tokens, channels), dtype=torch.float32)
        state = states.data_ptr(), states.stride(0), state_slots.data_ptr(), query_starts.data_ptr(), len(state_slots)
        inputs = x.data_ptr(), x.stride(0), kernel.data_ptr(), 0 if bias is None else bias.data_ptr()
        parts = -(-channels // CHANNELS)
        convolve(parts, tokens * CHANNELS * width, *state, output.data_ptr(), *inputs, channels, width)
    return output if activation is None else activate(output, None, activation)


def _convolve(
    x: torch.Tensor,
    kernel: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    state_slots: torch.Tensor,
    query_starts: torch.Tensor,
) -> np.ndarray:
    """The same by NumPy, without the activation."""
    inputs, past, starts = x.numpy(), states.numpy(), query_starts.tolist()
    output = np.zeros(inputs.shape, np.float32) if bias is None else np.tile(bias.numpy(), (len(inputs), 1))
    for slot, start, end in zip(state_slots.tolist(), starts, starts[1:], strict=False):
        joined = np.concatenate([past[slot].T, inputs[start:end]])
        for tap, factors in enumerate(kernel.numpy().T):
            output[start:end] += factors * joined[tap : tap + end - start]
        past[slot] = joined[end - start :].T
    return output
