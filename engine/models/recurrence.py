"""Recurrence in depth (HRM-Text): two stacks of layers that a step passes through several times.

A low and a high state of the stream start as a learned vector and as the embeddings. A cycle runs the low stack a few
times on the sum of both states, which becomes the low state, then the high stack on their sum, which becomes the high
one. Every pass has keys and values of its own: the metadata counts a layer for each, and the file holds those of the
two stacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trichord.models.config import ModelConfig
from trichord.models.linear import TensorSource
from trichord.models.norm import Norm
from trichord.models.record import BARE

Stream = tuple[torch.Tensor, torch.Tensor | None]
"""A residual (T, hidden) and what is still to be added to it."""
_START = "hrm.z_l_init"


@dataclass(frozen=True)
class Recurrence:
    """The order of the passes. `start` (hidden,) is the low state's; `norm` closes every pass through a stack."""

    start: torch.Tensor
    norm: Norm
    stack: int
    cycles: int
    low_passes: int

    @classmethod
    def of(cls, source: TensorSource, config: ModelConfig) -> Recurrence | None:
        """The recurrence of a file that has the low state's start. Raises ModelError when it does not add up."""
        if not source.has_tensor(_START):
            return None
        norm = Norm.of(source, BARE, config)
        assert norm is not None
        counts = config.recurrence
        if not all(counts) or len(config.layers) != counts[0] * counts[1] * (counts[2] + 1):
            raise source.fail(f"{len(config.layers)} layers do not make the cycles {counts} of a recurrence")
        return cls(source.vector(_START, config.hidden_size), norm, *counts)

    def block(self, layer: int) -> int:
        """The number of the file's block that holds a layer's weights: those of the low stack come first."""
        pass_in_cycle = layer // self.stack % (self.low_passes + 1)
        return layer % self.stack + self.stack * (pass_in_cycle == self.low_passes)

    def forward(self, x: torch.Tensor, through: Callable[[torch.Tensor, range], Stream]) -> torch.Tensor:
        """x (T, hidden) -> (T, hidden). `through` passes a stream, which it may overwrite, through some layers."""
        high, low = x, self.start
        layers = 0
        for _ in range(self.cycles):
            for index in range(self.low_passes + 1):
                state = self.norm(*through(high + low, range(layers, layers + self.stack)))
                layers += self.stack
                if index < self.low_passes:
                    low = state
                else:
                    high = state
        return high
