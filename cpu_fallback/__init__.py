"""The CPU backend: GGUF blocks read in place, as they lie in the file.

Works on the NumPy views of torch tensors. Numba compiles the kernels where it is installed; without it NumPy and BLAS
do the same, slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from trichord.cpu_fallback.activation import activate, activated_matmul
from trichord.cpu_fallback.attention import attention
from trichord.cpu_fallback.convolution import short_convolution
from trichord.cpu_fallback.experts import expert_matmul
from trichord.cpu_fallback.jit import default_threads, have_numba, set_threads
from trichord.cpu_fallback.matmul import FUSED_FORMATS, dequantize, embedding, matmul, pack, unpack
from trichord.cpu_fallback.norm import norm
from trichord.cpu_fallback.rotary import rotary_and_cache
from trichord.cpu_fallback.routing import route
from trichord.cpu_fallback.scan import delta_scan, state_scan
from trichord.weight_format import Layout

if TYPE_CHECKING:
    import torch

LAYOUT: Layout = "blocks"


def capture(compute: Callable[[], torch.Tensor], reset: Callable[[], None]) -> Callable[[], torch.Tensor] | None:
    """`recording.capture`; None where this computation, or any without Numba, cannot be recorded."""
    if not have_numba():
        return None
    from trichord.cpu_fallback.recording import Unrecordable, capture

    try:
        return capture(compute, reset)
    except Unrecordable:
        return None


__all__ = [
    "FUSED_FORMATS",
    "LAYOUT",
    "activate",
    "activated_matmul",
    "attention",
    "capture",
    "default_threads",
    "delta_scan",
    "dequantize",
    "embedding",
    "expert_matmul",
    "matmul",
    "norm",
    "pack",
    "rotary_and_cache",
    "route",
    "set_threads",
    "short_convolution",
    "state_scan",
    "unpack",
]
