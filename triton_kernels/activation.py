"""Gated activations of the feed-forward network."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def activation_kernel(gate, up, output, width, gate_stride, up_stride, BLOCK: tl.constexpr):
    """One program a token and BLOCK features."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    g = tl.load(gate + token * gate_stride + columns, mask=mask, other=0.0)
    u = tl.load(up + token * up_stride + columns, mask=mask, other=0.0)
    tl.store(output + token * width + columns, g / (1.0 + tl.exp(-g)) * u, mask=mask)


def activate(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """silu(gate) * up (T, F) float32, contiguous (Shazeer, 2020).

    Rows may be strided: gate and up may be the halves of one product.
    """
    tokens, width = gate.shape
    output = torch.empty((tokens, width), dtype=torch.float32, device=gate.device)
    activation_kernel[(tokens, triton.cdiv(width, BLOCK))](
        gate, up, output, width, gate.stride(0), up.stride(0), BLOCK=BLOCK, enable_fp_fusion=True
    )
    return output
