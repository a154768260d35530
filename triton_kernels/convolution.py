"""Short causal convolution along each sequence, which carries the last inputs from call to call."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.activation import activated

BLOCK_TOKENS, BLOCK_CHANNELS = 16, 64


@triton.jit
def _inputs(x, states, places, inside, token_stride, PAST: tl.constexpr):
    """The inputs (places, channels) at places among the state's PAST and then the sequence's own; 0 if not `inside`."""
    earlier = inside & (places < PAST)[:, None]
    past = tl.load(states[None, :] + places[:, None], mask=earlier, other=0.0)
    own = tl.load(
        x[None, :] + (places - PAST).to(tl.int64)[:, None] * token_stride,
        mask=inside & (places >= PAST)[:, None],
        other=0.0,
    )
    return tl.where(earlier, past, own)


@triton.jit
def convolution_kernel(
    x,
    kernel,
    bias,
    states,
    state_slots,
    query_starts,
    output,
    channels,
    token_stride,
    slot_stride,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PAST: tl.constexpr,
):
    """One program BLOCK_CHANNELS channels of a sequence, so that no other reads the state that it replaces."""
    PAST: tl.constexpr = WIDTH - 1
    sequence = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    exists = columns < channels
    first = tl.load(query_starts + sequence).to(tl.int64)
    tokens = tl.load(query_starts + sequence + 1) - first
    states += tl.load(state_slots + sequence) * slot_stride + columns * PAST
    x += first * token_stride + columns
    output += first * channels + columns
    for start in range(0, tokens, BLOCK_TOKENS):
        rows = start + tl.arange(0, BLOCK_TOKENS)
        inside = (rows < tokens)[:, None] & exists[None, :]
        y = tl.zeros([BLOCK_TOKENS, BLOCK_CHANNELS], tl.float32)
        if bias is not None:
            y += tl.load(bias + columns, mask=exists, other=0.0)[None, :]
        for tap in tl.static_range(WIDTH):
            factors = tl.load(kernel + columns * WIDTH + tap, mask=exists, other=0.0)
            y += factors[None, :] * _inputs(x, states, rows + tap, inside, token_stride, PAST)
        if ACTIVATION is not None:
            y = activated(y, ACTIVATION)
        tl.store(output[None, :] + rows.to(tl.int64)[:, None] * channels, y, mask=inside)
    kept = tl.arange(0, BLOCK_PAST)
    inside = (kept < PAST)[:, None] & exists[None, :]
    left = _inputs(x, states, tokens + kept, inside, token_stride, PAST)
    tl.debug_barrier()  # other threads of this program may have yet to read what is replaced
    tl.store(states[None, :] + kept[:, None], left, mask=inside)


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
    sequences, width = len(state_slots), kernel.shape[1]
    output = torch.empty((tokens, channels), dtype=torch.float32, device=x.device)
    block_tokens = 1 if tokens == sequences else BLOCK_TOKENS
    convolution_kernel[(triton.cdiv(channels, BLOCK_CHANNELS), sequences)](
        x,
        kernel,
        bias,
        states,
        state_slots,
        query_starts,
        output,
        channels,
        x.stride(0),
        states.stride(0),
        WIDTH=width,
        ACTIVATION=activation,
        BLOCK_TOKENS=block_tokens,
        BLOCK_CHANNELS=BLOCK_CHANNELS,
        BLOCK_PAST=triton.next_power_of_2(width - 1),
        num_warps=1 if block_tokens == 1 else 4,
        enable_fp_fusion=True,
    )
    return output
