"""Feed-forward networks: dense ones, and mixtures of experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trichord.dispatch import Activation, Operations, Precision, Prepared
from trichord.models.config import LayerConfig, ModelConfig
from trichord.models.linear import TensorSource, floats, project, project_experts
from trichord.models.norm import Norm
from trichord.models.step import Step

Choice = tuple[torch.Tensor, torch.Tensor]
"""Each token's experts (T, E) int32 and their weights (T, E)."""


class FeedForward:
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate.

    `suffix` distinguishes the shared experts' tensors. One matrix may hold gate and up.
    """

    def __init__(self, source: TensorSource, config: ModelConfig, suffix: str = "") -> None:
        self.operations = source.place.operations
        self.activation = config.architecture.activation
        down = source.shape(f"ffn_down{suffix}")
        self.output = source.linear(f"ffn_down{suffix}", config.hidden_size, down[-1])
        rows = source.shape(f"ffn_up{suffix}")[0]
        sides = _sides(source, f"ffn_gate{suffix}", rows == 2 * down[-1], self.activation)
        if rows != down[-1] and (len(sides) == 2 or rows != 2 * down[-1]):
            raise source.fail(f"{source.prefix}ffn_up{suffix} has {rows} rows, ffn_down{suffix} {down[-1]} columns")
        self.inputs = [source.linear(f"ffn_{side}{suffix}", rows, config.hidden_size) for side in sides]
        self.gated_width = down[-1] if rows == 2 * down[-1] else 0
        # How much the shared experts count is a number a token.
        self.share = source.optional_vector("ffn_gate_inp_shexp.weight", config.hidden_size) if suffix else None
        divisors = source.optional_vector("ffn.act.scales", down[-1])
        sub_norm = not suffix and source.has("ffn_sub_norm")
        self.sub_norm = Norm.of_heads(source, "ffn_sub_norm", 1, down[-1], config) if sub_norm else None
        self.factors = None if divisors is None else divisors.reciprocal()

    def forward(self, x: torch.Tensor | Prepared, step: Step) -> torch.Tensor:
        """x (T, hidden) -> (T, hidden)."""
        y = self._activated(x, step.precision)
        if self.factors is not None:
            y = floats(y).mul_(self.factors)
        if self.sub_norm:
            y = self.sub_norm(floats(y), prepare=step.precision)
        (y,) = project(y, [self.output], step.precision)
        return y if self.share is None else y.mul_((floats(x) @ self.share).sigmoid_()[:, None])

    def _activated(self, x: torch.Tensor | Prepared, precision: Precision) -> torch.Tensor | Prepared:
        """What the last matrix reads (T, width), in one pass where nothing comes between products and activation."""
        if self.gated_width or any(linear.adapters for linear in self.inputs):
            products = project(x, self.inputs, precision)
            return activated(self.operations, products, self.gated_width, self.activation, prepare=precision)
        weights, biases = [linear.weight for linear in self.inputs], [linear.bias for linear in self.inputs]
        return self.operations.activated_matmul(x, weights, precision, self.activation, biases)


def _sides(source: TensorSource, gate: str, fused: bool, activation: Activation) -> tuple[str, ...]:
    """The matrices that read the input. No network by SiLU comes without a gate: there, a file without it is broken."""
    gated = source.has(gate) or (not fused and activation in ("silu", "swiglu_oai"))
    return ("gate", "up") if gated else ("up",)


class ExpertNetworks:
    """Feed-forward networks of which each token takes a few. `suffix` distinguishes their tensors.

    They may work on a narrower vector, into which the stream is projected before them, and back behind them, and on
    another device than the rest of the layer.
    """

    def __init__(self, source: TensorSource, config: ModelConfig, layer: LayerConfig, suffix: str) -> None:
        self.home, self.operations = source.place, source.place.operations
        self.activation = config.architecture.activation
        self.weights_first = config.architecture.experts.weights_first
        self.clamp = layer.expert_clamp
        hidden = config.hidden_size
        self.narrowing = self.widening = None
        if source.has("ffn_latent_down"):
            narrow = source.shape("ffn_latent_down")[0]
            self.narrowing = source.linear("ffn_latent_down", narrow, hidden)
            self.widening = source.linear("ffn_latent_up", hidden, narrow)
            hidden = narrow
        shape = source.shape(f"ffn_down{suffix}")
        if len(shape) != 3:
            raise source.fail(f"tensor '{source.prefix}ffn_down{suffix}.weight' of shape {shape} holds no experts")
        self.count, width = shape[::2]
        matrices = source.of_experts()
        self.place = matrices.place
        self.output = matrices.linear(f"ffn_down{suffix}", self.count, hidden, width)
        fused = source.has(f"ffn_gate_up{suffix}")
        sides = _sides(source, f"ffn_gate{suffix}", fused, self.activation)
        self.inputs = (
            [matrices.linear(f"ffn_gate_up{suffix}", self.count, 2 * width, hidden)]
            if fused
            else [matrices.linear(f"ffn_{side}{suffix}", self.count, width, hidden) for side in sides]
        )
        self.gated_width = width if fused else 0

    def forward(self, x: torch.Tensor | Prepared, step: Step, choice: Choice) -> torch.Tensor:
        """x (T, hidden) -> (T, hidden), through the chosen experts."""
        chosen, weights = choice
        if self.narrowing:
            (x,) = project(x, [self.narrowing], step.precision)
        if self.place != self.home:
            x, chosen, weights = (part.to(self.place.device) for part in (floats(x), chosen, weights))
        inputs = (floats(x)[:, None] * weights[..., None]).contiguous() if self.weights_first else x
        products = project_experts(inputs, self.inputs, chosen, step.precision)
        y = activated(
            self.place.operations, products, self.gated_width, self.activation, self.clamp, prepare=step.precision
        )
        (y,) = project_experts(y, [self.output], chosen, step.precision)
        y = y.sum(1) if self.weights_first else torch.bmm(weights[:, None], y)[:, 0]
        y = y.to(self.home.device)
        return project(y, [self.widening], step.precision)[0] if self.widening else y


class Experts(ExpertNetworks):
    """Each token goes through the few experts that its router scores best."""

    def __init__(self, source: TensorSource, config: ModelConfig, layer: LayerConfig) -> None:
        if config.experts is None:
            raise source.fail(f"{source.prefix}ffn_gate_inp routes to experts that the metadata does not count")
        super().__init__(source, config, layer, "_exps")
        self.routing = config.experts
        if self.count != self.routing.count:
            raise source.fail(f"{source.prefix}ffn_down_exps holds {self.count} experts of {self.routing.count}")
        self.router = source.linear("ffn_gate_inp", self.count, config.hidden_size)
        names = ("exp_probs_b.bias", "exp_probs_b")
        self.bias = next((source.vector(name, self.count) for name in names if source.has_tensor(name)), None)

    def score(self, x: torch.Tensor | Prepared, step: Step) -> torch.Tensor:
        """The logits (T, X) of all experts for x (T, hidden)."""
        return project(x, [self.router], step.precision)[0]

    def best_of(self, logits: torch.Tensor) -> Choice:
        """The experts of each token by their logits (T, X)."""
        routing = self.routing
        return self.operations.route(
            logits,
            routing.used,
            routing.gating,
            self.bias,
            groups=routing.groups,
            groups_used=routing.groups_used,
            normalize=routing.normalize,
            scale=routing.scale,
        )

    def forward(self, x: torch.Tensor | Prepared, step: Step, choice: Choice | None = None) -> torch.Tensor:
        """x (T, hidden) -> (T, hidden), through the experts chosen by x itself or already."""
        return super().forward(x, step, choice or self.best_of(self.score(x, step)))


def activated(
    operations: Operations,
    products: Sequence[torch.Tensor],
    gated_width: int,
    activation: Activation,
    clamp: float = 0.0,
    *,
    prepare: Precision | None = None,
) -> torch.Tensor | Prepared:
    """Gate and up projections (..., F), one after the other or side by side in one (..., 2F), or up alone.

    With a clamp, what is multiplied is bounded: activation(gate) from above, up to both sides.
    """
    if gated_width:
        products = products[0].split(gated_width, dim=-1)
    gate, up = products if len(products) == 2 else (products[0], None)
    if clamp and up is not None:
        return operations.activate(gate, None, activation).clamp_(max=clamp).mul_(up.clamp(-clamp, clamp))
    return operations.activate(gate, up, activation, prepare=prepare)
