"""Adjugate experts (GroveMoE): a small expert for each group of adjacent experts, behind these."""

from __future__ import annotations

import torch

from trichord.dispatch import Prepared
from trichord.models.config import LayerConfig, ModelConfig
from trichord.models.feed_forward import Choice, ExpertNetworks, Experts
from trichord.models.linear import TensorSource
from trichord.models.step import Step


class AdjugateExperts(Experts):
    """Experts whose output also passes through the adjugate expert of each chosen expert's group."""

    def __init__(self, source: TensorSource, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__(source, config, layer)
        self.adjugates = ExpertNetworks(source, config, layer, "_chexps")
        group = self.routing.adjugate_group
        if not group or self.adjugates.count * group != self.count:
            raise source.fail(f"{self.adjugates.count} adjugate experts cannot serve {self.count} in groups of {group}")

    def forward(self, x: torch.Tensor | Prepared, step: Step, choice: Choice | None = None) -> torch.Tensor:
        """x (T, hidden) -> (T, hidden)."""
        logits = self.score(x, step)
        choice = choice or self.best_of(logits)
        total = super().forward(x, step, choice)
        groups = choice[0][:, : self.adjugates.count] // self.routing.adjugate_group
        # llama.cpp weighs a group by the probability of the expert that has the group's number.
        weights = logits.softmax(1).gather(1, groups.long())
        weights /= weights.sum(1, keepdim=True)
        return total.add_(self.adjugates.forward(total, step, (groups, weights)), alpha=self.routing.adjugate_scale)
