"""What all layers of one device share in one step."""

from __future__ import annotations

import torch

from trichord.batch import Batch
from trichord.dispatch import Precision
from trichord.rotary import Rotary, RotaryConfig


class Step:
    """The batch on one device, with the rotary angles of its positions, computed once for all layers."""

    def __init__(self, batch: Batch, rotaries: dict[RotaryConfig, Rotary], precision: Precision) -> None:
        self.batch = batch
        self.precision = precision
        self._rotaries = rotaries
        self._angles: dict[RotaryConfig, tuple[torch.Tensor, torch.Tensor]] = {}

    def angles(self, config: RotaryConfig | None) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (T, R/2) of the batch's positions; without a config nothing turns: (T, 0)."""
        if config is None:
            empty = self.batch.positions.new_empty((len(self.batch.positions), 0), dtype=torch.float32)
            return empty, empty
        if config not in self._angles:
            self._angles[config] = self._rotaries[config].tables(self.batch.positions)
        return self._angles[config]
