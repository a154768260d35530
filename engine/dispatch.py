"""Dispatch: one protocol of operations, two backends that satisfy it.

Work follows the weight, not a global device: a weight in layout "planes" is multiplied by the Triton kernels on its
GPU, one in layout "blocks" by the CPU fallback. Nothing but this module imports a backend.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol, cast, get_args

from trichord.errors import RequestError
from trichord.weight_format import Layout, Weight, WeightFormat

if TYPE_CHECKING:
    import torch

Precision = Literal["exact", "default", "fast"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


class Operations(Protocol):
    """What a backend offers. Tensors are torch tensors; activations are float32 unless a line says otherwise.

    T: tokens of the whole batch, laid flat. S: sequences. K, N: in and out features. H, G: query and key-value heads.
    D: head size. P: pages of the cache, each of `page` positions.
    """

    LAYOUT: Layout
    FUSED_FORMATS: frozenset[WeightFormat]

    def pack(self, blocks: torch.Tensor, format: WeightFormat, columns: int) -> torch.Tensor:
        """GGUF blocks (rows, row_bytes) uint8, already on the device -> the backend's layout, uint8."""

    def unpack(self, data: torch.Tensor, format: WeightFormat, rows: int, columns: int) -> torch.Tensor:
        """The inverse of `pack`: (rows, row_bytes) uint8."""

    def dequantize(self, weight: Weight) -> torch.Tensor:
        """The whole weight as float32 of `weight.shape` (without `weight.scale`)."""

    def matmul(self, x: torch.Tensor, weights: Sequence[Weight], precision: Precision) -> list[torch.Tensor]:
        """x (T, K) -> [x @ W.T (T, N) for each weight]. The weights share K; what x needs is prepared once."""

    def embedding(self, ids: torch.Tensor, weight: Weight) -> torch.Tensor:
        """ids (T,) int64 -> their rows (T, K)."""

    def rms_norm(
        self, residual: torch.Tensor, gain: torch.Tensor, epsilon: float, delta: torch.Tensor | None = None
    ) -> torch.Tensor:
        """residual (T, K) += delta, in place; returns residual / rms(residual) * gain (T, K)."""

    def rotary_and_cache(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slots: torch.Tensor,
        interleaved: bool,
    ) -> None:
        """Rotates q (T, H, D) in place; writes the rotated k (T, G, D) and v (T, G, Dv) at `slots` (T,) int64.

        cos, sin (T, R/2) rotate the first R <= D elements: pairs (2i, 2i+1) when interleaved, else (i, i + R/2).
        Caches are (P, G, page, D) in float32 or float16; slot = page index * page + offset.
        """

    def attention(
        self,
        q: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        page_tables: torch.Tensor,
        query_starts: torch.Tensor,
        context_lengths: torch.Tensor,
        max_query: int,
        scale: float,
        precision: Precision,
    ) -> torch.Tensor:
        """Causal attention of q (T, H, D) over the paged cache -> (T, H, Dv).

        Sequence s owns the query rows query_starts[s]:query_starts[s+1] (query_starts (S+1,) int32), which are the
        last of its context_lengths[s] (S,) int32 positions; position p lies in page page_tables[s, p // page]
        (page_tables (S, max_pages) int32). max_query is the longest query. Query head h reads key head h // (H / G).
        """

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, elementwise (T, F)."""


_BACKENDS: dict[Layout, str] = {"planes": "trichord.triton_kernels", "blocks": "trichord.cpu_fallback"}


def operations(layout: Layout) -> Operations:
    """The backend that works on weights of this layout."""
    return cast(Operations, importlib.import_module(_BACKENDS[layout]))


def set_threads(count: int) -> None:
    """How many threads the CPU's kernels use. Raises RequestError for a count below 1."""
    if count < 1:
        raise RequestError(f"The number of threads must be at least 1, not {count}.")
    importlib.import_module(_BACKENDS["blocks"]).set_threads(count)


def matmul(x: torch.Tensor, weights: Sequence[Weight], precision: Precision) -> list[torch.Tensor]:
    """x (T, K) float32 -> [x @ W.T (T, N)] for weights that share their layout, device and K."""
    products = operations(weights[0].layout).matmul(x, weights, precision)
    return [y if w.scale == 1.0 else y.mul_(w.scale) for y, w in zip(products, weights, strict=True)]


def dispatch_matmul(x: torch.Tensor, weight: Weight, precision: Precision = "default") -> torch.Tensor:
    """x (..., in_features) times the transposed weight -> (..., out_features), of x's dtype and on x's device.

    The weight's format and place choose the kernel. "exact" multiplies in float32, "default" rounds activations to
    16 bits a group of 32, "fast" to 8 bits. Raises RequestError when the shapes, dtype or precision do not fit.
    """
    if precision not in PRECISIONS:
        raise RequestError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    if len(weight.shape) != 2:
        raise RequestError(f"dispatch_matmul multiplies by a matrix, not by a weight of shape {weight.shape}")
    if not x.is_floating_point():
        raise RequestError(f"activations must be of a floating-point dtype, not {x.dtype}")
    if x.ndim == 0 or x.shape[-1] != weight.in_features:
        raise RequestError(
            f"activations of shape {tuple(x.shape)} do not fit a weight of shape {weight.shape}: "
            f"the last dimension must be {weight.in_features}"
        )
    import torch

    flat = x.detach().to(device=weight.device).float().reshape(-1, weight.in_features).contiguous()
    with torch.cuda.device_of(weight.data):  # kernels start on the current GPU
        (y,) = matmul(flat, [weight], precision)
    return y.to(device=x.device, dtype=x.dtype).reshape(*x.shape[:-1], weight.out_features)
