"""Dispatch: one protocol of operations, two backends that satisfy it.

Work follows the weight, not a global device: a weight in layout "planes" is multiplied by the Triton kernels on its
GPU, one in layout "blocks" by the CPU fallback. Nothing but this module imports a backend.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, cast, get_args

from trichord.errors import RequestError
from trichord.weight_format import Layout, Weight, WeightFormat

if TYPE_CHECKING:
    import torch

Precision = Literal["exact", "default", "fast"]
MOST_THREADS = 1024
PRECISIONS: tuple[str, ...] = get_args(Precision)
Activation = Literal["silu", "gelu", "gelu_erf", "relu", "relu_squared", "swiglu_oai"]
Gating = Literal["softmax", "sigmoid", "softmax_of_chosen"]


class Prepared(Protocol):
    """Rows of activations, and what a backend has made of them for its products: for these alone to read."""

    x: torch.Tensor
    """The rows themselves, float32."""

    def __len__(self) -> int:
        """How many tokens there are."""


class Fresh(NamedTuple):
    """What `Operations.rotary_and_cache` takes beside queries and caches."""

    k: torch.Tensor
    v: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor
    slots: torch.Tensor
    interleaved: bool


class Operations(Protocol):
    """What a backend offers. Tensors are torch tensors; activations are float32 unless a line says otherwise.

    T: tokens of the whole batch, laid flat. S: sequences. K, N: in and out features. H, G: query and key-value heads.
    D: head size. P: pages of the cache, each of `page` positions. X: experts, E of them chosen by each token.
    C: channels. B: slots of recurrent states, one a running sequence.

    Where an operation may `prepare` its result for products, in a precision, a backend that must round activations can
    do so in the same pass, and returns them `Prepared`; one with nothing to gain returns the tensor.
    """

    LAYOUT: Layout
    FUSED_FORMATS: frozenset[WeightFormat]

    def capture(
        self, compute: Callable[[], torch.Tensor], reset: Callable[[], None]
    ) -> Callable[[], torch.Tensor] | None:
        """Runs `compute`, and returns a function that gives its result for what its inputs hold by then, faster.

        Inputs are tensors that stay where they are; the result is valid until the next call. `reset` brings back what
        a run changes. None: this cannot be repeated. The CPU backend alone has this: a GPU's driver captures graphs.
        """

    def pack(self, blocks: torch.Tensor, format: WeightFormat, columns: int) -> torch.Tensor:
        """GGUF blocks (rows, row_bytes) uint8, already on the device -> the backend's layout, uint8."""

    def unpack(self, data: torch.Tensor, format: WeightFormat, rows: int, columns: int) -> torch.Tensor:
        """The inverse of `pack`: (rows, row_bytes) uint8."""

    def dequantize(self, weight: Weight) -> torch.Tensor:
        """The whole weight as float32 of `weight.shape` (without `weight.scale`)."""

    def matmul(
        self,
        x: torch.Tensor | Prepared,
        weights: Sequence[Weight],
        precision: Precision,
        biases: Sequence[torch.Tensor | None] | None = None,
    ) -> list[torch.Tensor]:
        """x (T, K) -> [x @ W.T (T, N) for each weight], each times `Weight.scale`, plus its bias (N,) where it has one.

        The weights share K; what x needs is prepared once.
        """

    def expert_matmul(
        self, x: torch.Tensor | Prepared, weights: Sequence[Weight], experts: torch.Tensor, precision: Precision
    ) -> list[torch.Tensor]:
        """Each token times the matrices of its experts: [(T, E, N) for each weight (X, N, K)].

        x is (T, K), one row for all of a token's experts, or (T, E, K), a row for each. experts (T, E) int32. The
        work and the weights read grow with the experts that are chosen, not with X.
        """

    def route(
        self,
        logits: torch.Tensor,
        count: int,
        gating: Gating,
        bias: torch.Tensor | None = None,
        *,
        groups: int = 1,
        groups_used: int = 1,
        normalize: bool = False,
        scale: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logits (T, X) -> the `count` experts of each token (T, E) int32, best first, and their weights (T, E).

        Scores are the softmax or the sigmoid of the logits ("softmax_of_chosen": experts are chosen by the logits, and
        the softmax is over the chosen). `bias` (X,) is added to the scores for choosing only. With several groups of
        adjacent experts, only the `groups_used` groups whose two best (biased) scores have the largest sum take part.
        `normalize` divides the weights by their sum; then they are multiplied by `scale`. Of equal scores, the lower
        index is taken.
        """

    def embedding(self, ids: torch.Tensor, weight: Weight) -> torch.Tensor:
        """ids (T,) int64 -> their rows (T, K)."""

    def norm(
        self,
        residual: torch.Tensor,
        gain: torch.Tensor | None,
        epsilon: float,
        delta: torch.Tensor | None = None,
        *,
        bias: torch.Tensor | None = None,
        centered: bool = False,
        prepare: Precision | None = None,
    ) -> torch.Tensor | Prepared:
        """residual (T, K) += delta, in place; returns its normalised rows (T, K) * gain + bias.

        A row is divided by its root mean square, or, `centered` (layer norm), by its standard deviation after its mean
        is subtracted; epsilon is added to the mean square or variance. gain, bias (K,), or (M, K) where row t takes
        line t % M. The rows of residual may be strided; a tensor (T, H, D), with any strides of tokens and heads, is
        normalised head by head, as (T * H, D) is, into (T, H, D). The result is contiguous, and `Prepared` only on
        request: then it is (T, K).
        """

    def rotary_and_cache(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor | None,
        slots: torch.Tensor,
        interleaved: bool,
        *,
        key_scales: torch.Tensor | None = None,
        value_scales: torch.Tensor | None = None,
    ) -> None:
        """Rotates q (T, H, D) in place; writes the rotated k (T, G, D) and v (T, G, Dv) at `slots` (T,) int64.

        cos, sin (T, R/2) rotate the first R <= D elements (R may be 0): pairs (2i, 2i+1) when interleaved, else
        (i, i + R/2). Caches are (P, G, page, D) in float32 or float16; slot = page index * page + offset. Without v
        only the keys are written.

        A cache of 8 bits has int8 numbers and scales (P, G, page, ceil(D/32)) float16: an element is its number times
        the scale of its group of 32 (the last one of a row may be shorter). A group's scale is its largest magnitude
        over 127, and numbers are rounded to nearest, up to 127. A NaN or an infinity spoils its group only.
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
        *,
        causal: bool = True,
        window: int = 0,
        chunked: bool = False,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
        slopes: torch.Tensor | None = None,
        key_scales: torch.Tensor | None = None,
        value_scales: torch.Tensor | None = None,
        fresh: Fresh | None = None,
        prepare: bool = False,
    ) -> torch.Tensor | Prepared:
        """Attention of q (T, H, D) over the paged cache -> (T, H, Dv), or, to `prepare` in its precision, (T, H * Dv).

        Sequence s owns the query rows query_starts[s]:query_starts[s+1] (query_starts (S+1,) int32), which are the
        last of its context_lengths[s] (S,) int32 positions; position p lies in page page_tables[s, p // page]
        (page_tables (S, max_pages) int32). max_query is the longest query. Query head h reads key head h // (H / G).
        value_cache may be a view of the key cache's last or first elements: a latent that is both. Caches of 8 bits
        come with their scales (see `rotary_and_cache`), and values then have a cache of their own.

        A query at position p sees positions up to p (all of its sequence's unless `causal`), of these with a window W
        only those after p - W, or, `chunked`, those from p // W * W on. A score s = scale * q.k becomes
        soft_cap * tanh(s / soft_cap) where that is not 0, then gains slopes[h] * (key position - p) (slopes (H,):
        ALiBi). sinks (H,) are a further score of each head, without a value, in the softmax's sum.

        With `fresh`, q is not turned yet, and its keys and values are not in the cache: `rotary_and_cache` comes first,
        and q holds anything afterwards. A backend can do both in one pass.
        """

    def activate(
        self,
        gate: torch.Tensor,
        up: torch.Tensor | None,
        activation: Activation,
        *,
        prepare: Precision | None = None,
    ) -> torch.Tensor | Prepared:
        """activation(gate) * up, elementwise (..., F); without `up` the activation alone. Rows may be strided.

        "gelu" is the tanh approximation, "gelu_erf" the exact one; "swiglu_oai" (gpt-oss) is
        g * sigmoid(1.702 g) * (u + 1) with g = min(gate, 7) and u = clamp(up, -7, 7).
        """

    def activated_matmul(
        self,
        x: torch.Tensor | Prepared,
        weights: Sequence[Weight],
        precision: Precision,
        activation: Activation,
        biases: Sequence[torch.Tensor | None] | None = None,
    ) -> torch.Tensor | Prepared:
        """What `activate` makes of `matmul`'s products with a gate and an up, or one alone -> (T, F), prepared."""

    def short_convolution(
        self,
        x: torch.Tensor,
        kernel: torch.Tensor,
        bias: torch.Tensor | None,
        states: torch.Tensor,
        state_slots: torch.Tensor,
        query_starts: torch.Tensor,
        activation: Activation | None,
    ) -> torch.Tensor:
        """Causal depthwise convolution along each sequence: x (T, C), kernel (C, W), bias (C,) -> (T, C).

        y[t] = bias + sum over w of kernel[:, w] * x[t - W + 1 + w], then the activation, if any; inputs before the
        query come from states (B, C, W - 1), at state_slots (S,) int64, oldest first, which are updated to the
        sequence's last W - 1 inputs. A new sequence's state, here and below, is the caller's to zero. The rows of x
        and the slots of states may be strided.
        """

    def state_scan(
        self,
        x: torch.Tensor,
        step_sizes: torch.Tensor,
        rates: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        states: torch.Tensor,
        state_slots: torch.Tensor,
        query_starts: torch.Tensor,
    ) -> torch.Tensor:
        """The selective scan of Mamba: x (T, H, P) -> (T, H, P), updating states (B, H, P, N) at state_slots (S,).

        state = exp(step_sizes * rates) * state + step_sizes * x outer b; y = state c, token by token.
        step_sizes (T, H), positive: their softplus is the caller's. rates (H, N) or, one for all n, (H, 1), negative:
        Mamba-1 has P = 1 and N rates, Mamba-2 one. b, c (T, G, N): head h reads group h // (H / G). Of x, step_sizes,
        b and c only the last dimension must be contiguous.
        """

    def delta_scan(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor | None,
        states: torch.Tensor,
        state_slots: torch.Tensor,
        query_starts: torch.Tensor,
        *,
        tiled: bool = False,
    ) -> torch.Tensor:
        """Linear attention with decay, by the (gated) delta rule when beta is given: -> (T, H, Dv).

        Token by token: state = exp(decay) * state; state += k outer (beta * (v - k state)), or k outer v without beta;
        y = q state. q, k (T, G, D), normalised and scaled by the caller: head h reads head h // (H / G), or h % G when
        `tiled` (the order of Qwen3.5's files). v (T, H, Dv). decay (T, H, 1) or (T, H, D), the logarithm of the factor
        of each row. beta (T, H). states (B, H, D, Dv) at state_slots (S,) int64. Of the inputs only the last dimension
        must be contiguous.
        """


_BACKENDS: dict[Layout, str] = {"planes": "trichord.triton_kernels", "blocks": "trichord.cpu_fallback"}


def operations(layout: Layout) -> Operations:
    """The backend that works on weights of this layout."""
    return cast(Operations, importlib.import_module(_BACKENDS[layout]))


def set_threads(count: int) -> None:
    """How many threads the CPU's kernels use. Raises RequestError for a count that no machine has."""
    if not 1 <= count <= MOST_THREADS:
        raise RequestError(f"The number of threads must be from 1 to {MOST_THREADS}, not {count}.")
    importlib.import_module(_BACKENDS["blocks"]).set_threads(count)


def matmul(
    x: torch.Tensor | Prepared,
    weights: Sequence[Weight],
    precision: Precision,
    biases: Sequence[torch.Tensor | None] | None = None,
) -> list[torch.Tensor]:
    """x (T, K) float32 -> [x @ W.T + bias (T, N)] for weights that share their layout, device and K."""
    return operations(weights[0].layout).matmul(x, weights, precision, biases)


def expert_matmul(
    x: torch.Tensor | Prepared, weights: Sequence[Weight], experts: torch.Tensor, precision: Precision
) -> list[torch.Tensor]:
    """x (T, K) or (T, E, K) float32, experts (T, E) int32 -> [(T, E, N)]: see `Operations.expert_matmul`."""
    products = operations(weights[0].layout).expert_matmul(x, weights, experts, precision)
    return [_scaled(y, weight.scale, experts) for y, weight in zip(products, weights, strict=True)]


def _scaled(y: torch.Tensor, scale: float | torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    if isinstance(scale, float):
        return y if scale == 1.0 else y.mul_(scale)
    return y.mul_(scale[experts.long()][..., None])


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
