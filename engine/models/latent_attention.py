"""Multi-head latent attention: keys and values of all heads come from one short vector (DeepSeek-V2, 2405.04434)."""

from __future__ import annotations

import math

import torch

from trichord.cache import KeyValueCache, KeyValueSpec, LatentSpec
from trichord.dispatch import Fresh, Prepared
from trichord.models.config import LayerConfig, ModelConfig
from trichord.models.linear import TensorSource, project, project_experts
from trichord.models.norm import Norm
from trichord.models.step import Step


class LatentAttention:
    """Queries of a part that turns and one that does not; keys of a turning part for all heads, and a latent.

    Files with attn_k_b and attn_v_b multiply the query, not the cached latents, by each head's key matrix, and what
    attention makes of the latents by its value matrix: one latent a position is cached, which is both key and value.
    In files with attn_kv_b every position's latent becomes the heads' own keys and values, which are cached.

    In the cache, as in queries here, the turning part comes first.
    """

    def __init__(self, source: TensorSource, config: ModelConfig, layer: LayerConfig) -> None:
        self.operations = source.place.operations
        self.config, self.layer = config, layer
        hidden, heads = config.hidden_size, layer.heads
        self.rank = source.shape("attn_kv_a_norm")[-1]
        latent_rows = source.shape("attn_kv_a_mqa")[0]
        self.turning = latent_rows - self.rank
        self.still = layer.head_size - self.turning
        if not 0 <= self.turning <= layer.head_size or (layer.rotary and layer.rotary.dimensions != self.turning):
            raise source.fail(f"{source.prefix}attn_kv_a_mqa leaves {self.turning} elements of keys to turn")
        latent = source.linear("attn_kv_a_mqa", latent_rows, hidden)
        self.latent_norm = Norm.of(source, ("attn_kv_a_norm",), config, size=self.rank)
        queries = heads * layer.head_size
        self.query_norm = self.query = None
        if source.has("attn_q_a"):
            rank = source.shape("attn_q_a")[0]
            self.inputs = [source.linear("attn_q_a", rank, hidden), latent]
            self.query_norm = Norm.of(source, ("attn_q_a_norm",), config, size=rank)
            self.query = source.linear("attn_q_b", queries, rank)
        else:
            self.inputs = [source.linear("attn_q", queries, hidden), latent]
        self.absorbed = source.has("attn_k_b")
        if self.absorbed:
            self.key = source.linear("attn_k_b", heads, self.rank, self.still)
            self.value = source.linear("attn_v_b", heads, layer.value_size, self.rank)
            self.heads = torch.arange(heads, dtype=torch.int32, device=source.place.device)
            self.cache = LatentSpec(self.rank, self.turning)
        else:
            self.key_value = source.linear("attn_kv_b", heads * (self.still + layer.value_size), self.rank)
            self.cache = KeyValueSpec(heads, layer.head_size, layer.value_size)
        self.output = source.linear("attn_output", hidden, heads * layer.value_size)
        stretch = layer.rotary.log_multiplier * math.log(layer.rotary.factor) if layer.rotary else 0.0
        self.scale = (1.0 + stretch) ** 2 * (config.attention_scale or layer.head_size**-0.5)

    def forward(self, x: torch.Tensor | Prepared, step: Step, cache: KeyValueCache) -> torch.Tensor:
        """x (T, hidden) -> (T, hidden); writes the batch's latents, or keys and values, into the cache."""
        tokens, heads, batch = len(x), self.layer.heads, step.batch
        q, latent = project(x, self.inputs, step.precision)
        if self.query:
            (q,) = project(self.query_norm(q, prepare=step.precision), [self.query], step.precision)
        still, turning = q.view(tokens, heads, -1).split([self.still, self.turning], dim=2)
        latent, turning_key = latent.split([self.rank, self.turning], dim=1)
        latent, turning_key = self.latent_norm(latent), turning_key[:, None]
        v = None
        if self.absorbed:
            experts = self.heads.repeat(tokens, 1)
            (still,) = project_experts(still.contiguous(), [self.key], experts, step.precision)
            k = torch.cat((turning_key, latent[:, None]), dim=2)
        else:
            (products,) = project(latent, [self.key_value], step.precision)
            k, v = products.view(tokens, heads, -1).split([self.still, self.layer.value_size], dim=2)
            k, v = torch.cat((turning_key.expand(-1, heads, -1), k), dim=2), v.contiguous()
        q = torch.cat((turning, still), dim=2)
        if self.config.temperature:
            q *= step.growth(self.config.temperature)
        cos, sin = step.angles(self.layer.rotary)
        interleaved = self.config.architecture.rotary == "interleaved"
        mixed = self.operations.attention(
            q,
            cache.keys,
            cache.values,
            batch.page_tables,
            batch.query_starts,
            batch.context_lengths,
            batch.max_query,
            self.scale,
            step.precision,
            key_scales=cache.key_scales,
            value_scales=cache.value_scales,
            fresh=Fresh(k, v, cos, sin, batch.slots, interleaved),
        )
        if self.absorbed:
            (mixed,) = project_experts(mixed, [self.value], experts, step.precision)
        (y,) = project(mixed.view(tokens, -1), [self.output], step.precision)
        return y
