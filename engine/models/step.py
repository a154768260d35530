"""What all layers of one device share in one step."""

from __future__ import annotations

import torch

from trichord.batch import Batch
from trichord.dispatch import Precision
from trichord.models.record import Temperature
from trichord.rotary import Rotary, RotaryConfig


class Step:
    """The batch on one device, with the rotary angles of its positions, computed once for all layers."""

    def __init__(self, batch: Batch, rotaries: dict[RotaryConfig, Rotary], precision: Precision) -> None:
        self.batch = batch
        self.embedded: torch.Tensor | None = None
        """The batch's embeddings (T, hidden), where layers add them again."""
        self.precision = precision
        self._rotaries = rotaries
        self._growth: dict[Temperature, torch.Tensor] = {}
        self._angles: dict[RotaryConfig, tuple[torch.Tensor, torch.Tensor]] = {}

    def angles(self, config: RotaryConfig | None) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (T, R/2) of the batch's positions; without a config nothing turns: (T, 0)."""
        if config is None:
            empty = self.batch.positions.new_empty((len(self.batch.positions), 0), dtype=torch.float32)
            return empty, empty
        if config not in self._angles:
            self._angles[config] = self._rotaries[config].tables(self.batch.positions)
        return self._angles[config]

    def growth(self, temperature: Temperature) -> torch.Tensor:
        """What queries at the batch's positions are multiplied by: (T, 1, 1)."""
        if temperature not in self._growth:
            intervals = (self.batch.positions + temperature.offset) // temperature.length
            self._growth[temperature] = 1.0 + temperature.scale * torch.log1p(intervals.float())[:, None, None]
        return self._growth[temperature]
