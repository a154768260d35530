"""RMS normalisation of the residual stream, with the residual's addition in the same launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_BLOCK = 16384  # elements of a row held in registers at once: 64 a thread with the 8 warps below


@triton.jit
def _updated(residual, delta, columns, width, HAS_DELTA: tl.constexpr):
    """The row's elements at `columns` after the addition, written back when there is one."""
    mask = columns < width
    row = tl.load(residual + columns, mask=mask, other=0.0)
    if HAS_DELTA:
        row += tl.load(delta + columns, mask=mask, other=0.0)
        tl.store(residual + columns, row, mask=mask)
    return row


@triton.jit
def norm_kernel(
    residual,
    delta,
    gain,
    output,
    width,
    residual_stride,
    delta_stride,
    epsilon,
    HAS_DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row. The first block stays in registers; a row wider than BLOCK is read once more."""
    token = tl.program_id(0).to(tl.int64)
    residual += token * residual_stride
    delta += token * delta_stride
    output += token * width
    columns = tl.arange(0, BLOCK)
    first = _updated(residual, delta, columns, width, HAS_DELTA)
    squares = first * first
    for start in range(BLOCK, width, BLOCK):
        row = _updated(residual, delta, start + columns, width, HAS_DELTA)
        squares += row * row
    inverse = tl.rsqrt(tl.sum(squares, axis=0) / width + epsilon)
    mask = columns < width
    tl.store(output + columns, first * inverse * tl.load(gain + columns, mask=mask, other=0.0), mask=mask)
    tl.debug_barrier()  # the loop below reads what other threads of this program may have written above
    for start in range(BLOCK, width, BLOCK):
        mask = start + columns < width
        row = tl.load(residual + start + columns, mask=mask, other=0.0)
        scaled = row * inverse * tl.load(gain + start + columns, mask=mask, other=0.0)
        tl.store(output + start + columns, scaled, mask=mask)


def norm(
    residual: torch.Tensor, gain: torch.Tensor, epsilon: float, delta: torch.Tensor | None = None
) -> torch.Tensor:
    """residual (T, K) float32 += delta, in place; returns residual / rms(residual) * gain (T, K), contiguous.

    rms(x) = sqrt(mean(x²) + epsilon) (Zhang and Sennrich, 2019). Rows may be strided, elements of a row may not.
    """
    tokens, width = residual.shape
    output = torch.empty((tokens, width), dtype=torch.float32, device=residual.device)
    block = min(triton.next_power_of_2(width), MAX_BLOCK)
    norm_kernel[(tokens,)](
        residual,
        residual if delta is None else delta,
        gain,
        output,
        width,
        residual.stride(0),
        0 if delta is None else delta.stride(0),
        epsilon,
        HAS_DELTA=delta is not None,
        BLOCK=block,
        num_warps=max(1, min(8, block // 256)),
        enable_fp_fusion=True,
    )
    return output
