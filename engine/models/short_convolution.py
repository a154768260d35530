"""The gated short convolution of LFM2: a block that remembers the last few inputs of each channel."""

from __future__ import annotations

import torch

from trichord.cache import StateCache, StateSpec
from trichord.dispatch import Prepared
from trichord.models.config import LayerConfig, ModelConfig
from trichord.models.linear import TensorSource, project
from trichord.models.step import Step


class ShortConvolution:
    """out(c * convolution(b * x)), where b, c and x are projections of the input."""

    def __init__(self, source: TensorSource, config: ModelConfig, layer: LayerConfig) -> None:
        self.operations = source.place.operations
        width, taps = config.hidden_size, source.shape("shortconv.conv")[-1]
        self.input = source.linear("shortconv.in_proj", 3 * width, width)
        self.kernel = source.vector("shortconv.conv.weight", width, taps)
        self.output = source.linear("shortconv.out_proj", width, width)
        self.cache = StateSpec(((width, taps - 1),))

    def forward(self, x: torch.Tensor | Prepared, step: Step, cache: StateCache) -> torch.Tensor:
        """x (T, hidden) -> (T, hidden); moves the sequences' states on."""
        batch = step.batch
        (products,) = project(x, [self.input], step.precision)
        b, c, x = products.chunk(3, dim=1)
        y = self.operations.short_convolution(
            b * x, self.kernel, None, *cache.states, batch.state_slots, batch.query_starts, None
        )
        (y,) = project(y.mul_(c), [self.output], step.precision)
        return y
