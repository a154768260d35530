"""A decoder layer: what mixes tokens, what works on each of them, and the norms between."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trichord.cache import Cache
from trichord.dispatch import Precision, Prepared
from trichord.models.adjugate_experts import AdjugateExperts
from trichord.models.config import LayerConfig, ModelConfig
from trichord.models.feed_forward import Experts, FeedForward
from trichord.models.linear import TensorSource, floats
from trichord.models.mixers import mixers
from trichord.models.norm import Norm
from trichord.models.step import Step


class DecoderLayer:
    """Mixers and feed-forward networks, each behind its norm, added to the residual stream.

    The residual is updated in place; the layer's last contribution is handed on as `delta`, which the next norm adds,
    so that the addition costs no pass of its own.
    """

    def __init__(self, source: TensorSource, config: ModelConfig, layer: LayerConfig) -> None:
        architecture = config.architecture
        self.place = source.place
        alone = architecture.single_blocks
        has_network = (layer.feed_forward and not alone) or source.has("ffn_up") or source.has("ffn_gate_inp")
        self.mixers = [] if alone and has_network else mixers(source, config, layer)
        self.caches = [mixer.cache for mixer in self.mixers]
        routing = architecture.experts
        kind = AdjugateExperts if source.has("ffn_down_chexps") else Experts
        self.experts = kind(source, config, layer) if source.has("ffn_gate_inp") else None
        self.early = routing.early
        # The norm of experts that read the layer's input and work beside the whole layer.
        self.expert_norm = Norm.of(source, ("ffn_norm_exps",), config) if source.has("ffn_norm_exps") else None
        self.networks: list[FeedForward] = []
        if self.experts and any(source.has(f"ffn_{side}_shexp") for side in ("gate", "up", "down")):
            self.networks.append(FeedForward(source, config, "_shexp"))
        if (has_network and not self.experts) or (routing.dense and source.has("ffn_up")):
            self.networks.append(FeedForward(source, config))
        self.company = routing.company if self.experts and self.networks else 1.0
        self.skip = source.vector("layer_output_scale.weight", 1) if architecture.embedding_skip else None
        self.normed_stream = architecture.normed_stream
        self.kept_scale = config.residual_scale if architecture.normed_input_kept else 0.0
        self.residual_scale = 1.0 if architecture.normed_input_kept else config.residual_scale
        self.parallel = config.parallel
        names = architecture.attention_norm if alone else architecture.feed_forward_norm
        if architecture.parallel == "without_norm" and not any(source.has(name) for name in names):
            self.parallel, names = True, ()
        self.attention_norm = Norm.of(source, architecture.attention_norm, config) if self.mixers else None
        epsilon = architecture.post_norm_epsilon
        self.attention_post_norm = Norm.of(source, architecture.attention_post_norm, config, epsilon)
        self.feed_forward_norm = Norm.of(source, names, config) if self.networks or self.experts else None
        self.feed_forward_post_norm = Norm.of(source, architecture.feed_forward_post_norm, config, epsilon)

    def forward(
        self, residual: torch.Tensor, delta: torch.Tensor | None, step: Step, caches: Sequence[Cache]
    ) -> torch.Tensor | None:
        """Adds `delta`, and all but this layer's last contribution, to the residual (T, hidden); returns that one."""
        x, mixed = residual, delta
        if self.mixers:
            x = self._enter(self.attention_norm, residual, delta, step)
        choice = self.experts.best_of(self.experts.score(residual, step)) if self.experts and self.early else None
        ahead = []
        if self.experts and self.expert_norm:
            ahead = [self.experts.forward(self.expert_norm(residual, prepare=step.precision), step)]
        if self.mixers:
            mixed = sum_of([mixer.forward(x, step, cache) for mixer, cache in zip(self.mixers, caches, strict=True)])
        if self.normed_stream:
            residual.copy_(self.attention_post_norm(residual, mixed))
            outputs = [network.forward(residual, step) for network in self.networks]
            residual.copy_(self.feed_forward_post_norm(residual, sum_of(outputs)))
            return None
        if self.mixers:
            mixed = self._leave(self.attention_post_norm, mixed)
        if not self.networks and not self.experts:
            return mixed
        if self.parallel:
            y = self.feed_forward_norm(residual, prepare=step.precision) if self.feed_forward_norm else x
        else:
            y = self._enter(self.feed_forward_norm, residual, mixed, step)
        outputs = [network.forward(y, step) for network in self.networks]
        outputs += ahead or ([self.experts.forward(y, step, choice)] if self.experts else [])
        output = sum_of(outputs)
        output = self._leave(self.feed_forward_post_norm, output if self.company == 1.0 else output.mul_(self.company))
        if self.parallel:
            output.add_(mixed)
        return output if self.skip is None else output.add_(step.embedded * self.skip)

    def _enter(
        self, norm: Norm | None, residual: torch.Tensor, delta: torch.Tensor | None, step: Step
    ) -> torch.Tensor | Prepared:
        x = enter(norm, residual, delta, step.precision)
        if self.kept_scale:
            torch.mul(floats(x), self.kept_scale, out=residual)
        return x

    def _leave(self, norm: Norm | None, y: torch.Tensor) -> torch.Tensor:
        y = norm(y) if norm else y
        return y if self.residual_scale == 1.0 else y.mul_(self.residual_scale)


def enter(
    norm: Norm | None, residual: torch.Tensor, delta: torch.Tensor | None, prepare: Precision | None = None
) -> torch.Tensor | Prepared:
    """residual += delta; returns what the block behind the norm reads: on request, what its products alone do."""
    if norm:
        return norm(residual, delta, prepare=prepare)
    return residual if delta is None else residual.add_(delta)


def sum_of(parts: list[torch.Tensor]) -> torch.Tensor:
    """The sum of one or more tensors of the same shape; the first is overwritten."""
    total, *rest = parts
    for part in rest:
        total.add_(part)
    return total
