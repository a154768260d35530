"""Activations of the feed-forward network, gated or not, and alone for other kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.activations import Activations, store_limbs
from trichord.triton_kernels.dependent import await_predecessor, dependent_launch

BLOCK = 1024

_NORMAL_TAIL = tl.constexpr(
    (
        0.1396214,
        0.13986187,
        0.11983286,
        0.10550803,
        -0.023109902,
        0.15917426,
        -0.25571433,
        0.14397174,
        -0.02914594,
    )
)
"""P, lowest power first, in 1 - Phi(a) = exp(-a²/2) t P(t), t = 1 / (1 + 0.35 a): the tail of the normal distribution.

Fitted to 3e-8, relative, on 0 <= a <= 14, beyond which exp(-a²/2) is no float32.
"""


@triton.jit
def _power_of_two(exponent):
    """2 to a float64 power <= 0, as float32. A hardware's exponential is accurate for small exponents only."""
    exponent = tl.maximum(exponent, -200.0)
    whole = tl.floor(exponent)
    return tl.exp2(whole.to(tl.float32)) * tl.exp2((exponent - whole).to(tl.float32))


@triton.jit
def _gelu(x):
    """x sigmoid(2 z), which is x (1 + tanh(z)) / 2 without its cancellation, z = sqrt(2 / pi) (x + 0.044715 x³).

    The exponent is computed in float64: its error is the relative error of the tail.
    """
    a = tl.abs(x).to(tl.float64)
    e = _power_of_two(-2.302208198144325 * a * (1.0 + 0.044715 * a * a))  # log2(e) sqrt(8 / pi)
    return x * tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _gelu_erf(x, TAIL: tl.constexpr):
    """x Phi(x), Phi the normal distribution, from its tail on the side of x."""
    a = tl.abs(x)
    t = 1.0 / (1.0 + 0.35 * a)
    tail = TAIL[8]
    for index in tl.static_range(7, -1, -1):
        tail = tail * t + TAIL[index]
    wide = a.to(tl.float64)
    tail *= t * _power_of_two(-0.7213475204444817 * wide * wide)  # log2(e) / 2
    return x * tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """The activation of float32 numbers, by its name in `trichord.dispatch.Activation`."""
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = _gelu(x)
    elif ACTIVATION == "gelu_erf":
        y = _gelu_erf(x, _NORMAL_TAIL)
    elif ACTIVATION == "swiglu_oai":
        x = tl.minimum(x, 7.0)
        y = x / (1.0 + tl.exp(-1.702 * x))
    else:
        tl.static_assert(ACTIVATION == "relu" or ACTIVATION == "relu_squared")
        y = tl.maximum(x, 0.0)
        if ACTIVATION == "relu_squared":
            y *= y
    return y


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """activation(gate) * up, or the activation alone where up is None."""
    y = activated(gate, ACTIVATION)
    if up is not None:
        if ACTIVATION == "swiglu_oai":
            up = tl.minimum(tl.maximum(up, -7.0), 7.0) + 1.0
        y *= up
    return y


@triton.jit
def activation_kernel(
    gate,
    up,
    output,
    limbs,
    width,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    LIMBS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a row and BLOCK features, as floats and, with LIMBS, as integers."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    await_predecessor(PDL)
    u = None
    if up is not None:
        u = tl.load(up + row * up_stride + columns, mask=mask, other=0.0)
    y = gated(tl.load(gate + row * gate_stride + columns, mask=mask, other=0.0), u, ACTIVATION)
    tl.store(output + row * width + columns, y, mask=mask)
    if LIMBS:
        group = tl.program_id(1) * (BLOCK // 32) + tl.arange(0, BLOCK // 32)[:, None]
        groups = width // 32
        store_limbs(tl.reshape(y, (BLOCK // 32, 32)), row * groups + group, group < groups, limbs, LIMBS)


def activate(
    gate: torch.Tensor, up: torch.Tensor | None, activation: str, *, prepare: str | None = None
) -> torch.Tensor | Activations:
    """activation(gate) * up, elementwise (..., F) float32, contiguous; without `up` the activation alone.

    "silu" (with up: SwiGLU, Shazeer, 2020); "gelu", the tanh approximation, and "gelu_erf", the exact one (Hendrycks
    and Gimpel, 2016); "relu"; "relu_squared" (So et al., 2021); "swiglu_oai", that of gpt-oss:
    g * sigmoid(1.702 g) * (u + 1) with g = min(gate, 7), u = clamp(up, -7, 7). Rows may be strided: gate and up may be
    the halves of one product. With a precision to `prepare` for, the result is what `matmul` and `expert_matmul` read
    in it.
    """
    output = torch.empty(gate.shape, dtype=torch.float32, device=gate.device)
    width = gate.shape[-1]
    activations = Activations(output)
    count = activations.wanted_limbs(prepare)
    gates, ups = (None if tensor is None else tensor.reshape(-1, width) for tensor in (gate, up))
    activation_kernel[(len(gates), triton.cdiv(width, BLOCK))](
        gates,
        ups,
        output,
        activations.new_limbs(count) if count else None,
        width,
        gates.stride(0),
        0 if ups is None else ups.stride(0),
        ACTIVATION=activation,
        LIMBS=count,
        BLOCK=BLOCK,
        enable_fp_fusion=True,
        **dependent_launch(),
    )
    return output if prepare is None else activations
