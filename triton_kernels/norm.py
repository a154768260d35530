"""Normalisation of the residual stream, or of heads: the residual's addition and the rounding in the same launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.activations import Activations, store_limbs
from trichord.triton_kernels.dependent import await_predecessor, dependent_launch

MAX_BLOCK = 8192  # elements of a row held in registers at once: 16 a thread with the 16 warps below
SPAN = 1024  # elements that a program takes at least: several rows where they are short


@triton.jit
def _updated(residual, delta, present, columns, width):
    """The rows' elements at `columns` after the addition, written back when there is one."""
    mask = present & (columns < width)
    x = tl.load(residual + columns, mask=mask, other=0.0)
    if delta is not None:
        x += tl.load(delta + columns, mask=mask, other=0.0)
        tl.store(residual + columns, x, mask=mask)
    return x


@triton.jit
def _store(output, limbs, x, scale, gain, bias, row, present, start, width, LIMBS: tl.constexpr):
    """The rows' elements from `start` on, as floats and, with LIMBS, as integers."""
    BLOCK: tl.constexpr = x.shape[1]
    columns = start + tl.arange(0, BLOCK)[None, :]
    mask = present & (columns < width)
    x *= scale
    if gain is not None:
        x *= tl.load(gain + columns, mask=mask, other=0.0)
    if bias is not None:
        x += tl.load(bias + columns, mask=mask, other=0.0)
    tl.store(output + columns, x, mask=mask)
    if LIMBS:
        GROUPS: tl.constexpr = x.shape[0] * BLOCK // 32
        group = start // 32 + tl.arange(0, BLOCK // 32)[None, :]
        valid = tl.reshape(present & (group < width // 32), (GROUPS, 1))
        group = tl.reshape(row.to(tl.int64) * (width // 32) + group, (GROUPS, 1))
        store_limbs(tl.reshape(x, (GROUPS, 32)), group, valid, limbs, LIMBS)


@triton.jit
def norm_kernel(
    residual,
    delta,
    gain,
    bias,
    output,
    limbs,
    rows,
    heads,
    width,
    gain_lines,
    bias_lines,
    residual_token_stride,
    residual_head_stride,
    delta_token_stride,
    delta_head_stride,
    epsilon,
    CENTERED: tl.constexpr,
    LIMBS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program ROWS rows. Their first block stays in registers; rows wider than BLOCK are read again."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    present = row < rows
    token, head = (row // heads).to(tl.int64), row % heads
    residual += token * residual_token_stride + head * residual_head_stride
    if delta is not None:
        delta += token * delta_token_stride + head * delta_head_stride
    if gain is not None:
        gain += row % gain_lines * width
    if bias is not None:
        bias += row % bias_lines * width
    output += row.to(tl.int64) * width
    columns = tl.arange(0, BLOCK)[None, :]
    await_predecessor(PDL)
    first = _updated(residual, delta, present, columns, width)
    sums = first if CENTERED else first * first
    for start in range(BLOCK, width, BLOCK):
        x = _updated(residual, delta, present, start + columns, width)
        sums += x if CENTERED else x * x
    tl.debug_barrier()  # the loops below read what other threads of this program may have written above
    mean = 0.0
    if CENTERED:
        mean = tl.sum(sums, axis=1, keep_dims=True) / width
        first = tl.where(columns < width, first - mean, 0.0)
        sums = first * first
        for start in range(BLOCK, width, BLOCK):
            mask = present & (start + columns < width)
            x = tl.where(mask, tl.load(residual + start + columns, mask=mask, other=0.0) - mean, 0.0)
            sums += x * x
    scale = tl.rsqrt(tl.sum(sums, axis=1, keep_dims=True) / width + epsilon)
    _store(output, limbs, first, scale, gain, bias, row, present, 0, width, LIMBS)
    for start in range(BLOCK, width, BLOCK):
        x = tl.load(residual + start + columns, mask=present & (start + columns < width), other=0.0) - mean
        _store(output, limbs, x, scale, gain, bias, row, present, start, width, LIMBS)


def norm(
    residual: torch.Tensor,
    gain: torch.Tensor | None,
    epsilon: float,
    delta: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    centered: bool = False,
    prepare: str | None = None,
) -> torch.Tensor | Activations:
    """residual (T, K) float32 += delta, in place; returns its normalised rows (T, K) * gain + bias, contiguous.

    A row is divided by sqrt(mean(x²) + epsilon) (RMS norm: Zhang and Sennrich, 2019), or, `centered`, by
    sqrt(variance + epsilon) after its mean is subtracted (layer norm: Ba et al., 2016). gain and bias, contiguous, are
    (K,), or (M, K) where row t takes line t % M. residual and delta may be (T, H, D): then each head is a row, row
    t * H + h, and so is the result's. Only the elements of a row must be adjacent. With a precision to `prepare` (T, K)
    for, the result is what `matmul` reads in it.
    """
    *leading, width = residual.shape
    heads = leading[1] if len(leading) == 2 else 1
    rows = leading[0] * heads
    output = torch.empty(residual.shape, dtype=torch.float32, device=residual.device)
    block = min(triton.next_power_of_2(width), MAX_BLOCK // 2 if centered else MAX_BLOCK)  # the mean costs registers
    rows_together = max(1, SPAN // block)
    activations = Activations(output)
    count = activations.wanted_limbs(prepare)
    norm_kernel[(triton.cdiv(rows, rows_together),)](
        residual,
        delta,
        gain,
        bias,
        output,
        activations.new_limbs(count) if count else None,
        rows,
        heads,
        width,
        *(1 if lines is None else lines.numel() // width for lines in (gain, bias)),
        *_strides(residual),
        *_strides(delta),
        epsilon,
        CENTERED=centered,
        LIMBS=count,
        ROWS=rows_together,
        BLOCK=block,
        num_warps=max(1, min(16, rows_together * block // 256)),
        enable_fp_fusion=True,
        **dependent_launch(),
    )
    return output if prepare is None else activations


def _strides(x: torch.Tensor | None) -> tuple[int, int]:
    """Elements from a token to the next and from a head to the next."""
    if x is None:
        return 0, 0
    return x.stride(0), x.stride(1) if x.ndim == 3 else 0
