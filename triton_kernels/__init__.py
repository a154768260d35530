"""The operations of `trichord.dispatch.Operations` on CUDA and HIP, in Triton. Knows tensors and formats, no model.

Weights are in layout "planes": see `formats.format`. With TRITON_INTERPRET=1 in the environment before the import,
the kernels run in Triton's interpreter on CPU tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trichord.triton_kernels.activation import activate
from trichord.triton_kernels.attention import attention
from trichord.triton_kernels.convolution import short_convolution
from trichord.triton_kernels.formats import FORMATS
from trichord.triton_kernels.gated import activated_matmul
from trichord.triton_kernels.matmul import expert_matmul, matmul
from trichord.triton_kernels.norm import norm
from trichord.triton_kernels.rotary import rotary_and_cache
from trichord.triton_kernels.routing import route
from trichord.triton_kernels.rows import dequantize, embedding
from trichord.triton_kernels.scan import delta_scan, state_scan
from trichord.weight_format import Layout, WeightFormat

if TYPE_CHECKING:
    import torch

LAYOUT: Layout = "planes"
FUSED_FORMATS = frozenset(FORMATS)


def pack(blocks: torch.Tensor, format: WeightFormat, columns: int) -> torch.Tensor:
    """GGUF blocks (rows, row_bytes) uint8 -> planes, one-dimensional uint8, on the same device."""
    return FORMATS[format].pack(blocks, columns)


def unpack(data: torch.Tensor, format: WeightFormat, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `pack`: (rows, row_bytes) uint8."""
    return FORMATS[format].unpack(data, rows, columns)


__all__ = [
    "FUSED_FORMATS",
    "LAYOUT",
    "activate",
    "activated_matmul",
    "attention",
    "delta_scan",
    "dequantize",
    "embedding",
    "expert_matmul",
    "matmul",
    "norm",
    "pack",
    "rotary_and_cache",
    "route",
    "short_convolution",
    "state_scan",
    "unpack",
]
