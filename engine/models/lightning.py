"""Lightning attention: linear attention whose memory fades at a fixed rate a head (Qin et al., 2401.04658)."""

from __future__ import annotations

import torch

from trichord.cache import StateCache, StateSpec
from trichord.dispatch import Prepared
from trichord.models.attention import alibi_slopes
from trichord.models.config import LayerConfig, ModelConfig
from trichord.models.linear import TensorSource, project
from trichord.models.norm import Norm
from trichord.models.step import Step


class LightningAttention:
    """Each head adds the outer product of its key and value to a matrix that fades, and reads it by its query."""

    def __init__(self, source: TensorSource, config: ModelConfig, layer: LayerConfig) -> None:
        self.operations = source.place.operations
        self.heads, size = layer.heads, layer.head_size
        width = self.heads * size
        self.inputs = [
            source.linear("attn_qkv", 3 * width, config.hidden_size),
            source.linear("attn_gate", width, config.hidden_size),
        ]
        self.norm = Norm.of(source, ("attn_norm_2",), config, size=width)
        self.output = source.linear("attn_output", config.hidden_size, width)
        # Heads fade by the slopes of ALiBi, and the more slowly the higher the layer lies.
        rates = alibi_slopes(self.heads, 8.0) * (1.0 - layer.depth + 1e-5)
        self.decay = -rates.to(source.place.device)[:, None]
        self.cache = StateSpec(((self.heads, size, size),))

    def forward(self, x: torch.Tensor | Prepared, step: Step, cache: StateCache) -> torch.Tensor:
        """x (T, hidden) -> (T, hidden); moves the sequences' states on."""
        batch = step.batch
        mixed, gate = project(x, self.inputs, step.precision)
        mixed = self.operations.activate(mixed, None, "silu").view(len(x), self.heads, -1)
        q, k, v = mixed.chunk(3, dim=2)
        decay = self.decay.expand(len(x), -1, -1)
        y = self.operations.delta_scan(q, k, v, decay, None, *cache.states, batch.state_slots, batch.query_starts)
        y = self.norm(y.view(len(x), -1))
        (y,) = project(y.mul_(gate.sigmoid_()), [self.output], step.precision)
        return y
