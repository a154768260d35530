"""Grouped-query attention over the paged cache."""

from __future__ import annotations

import torch

from trichord.cache import KeyValueCache, KeyValueSpec
from trichord.dispatch import Fresh, Prepared
from trichord.models.config import LayerConfig, ModelConfig
from trichord.models.linear import Linear, TensorSource, project
from trichord.models.norm import Norm
from trichord.models.step import Step
from trichord.rotary import rotated


class Attention:
    """Queries, keys and values from the input, attention over what the sequence has seen, and the output matrix."""

    def __init__(self, source: TensorSource, config: ModelConfig, layer: LayerConfig) -> None:
        architecture = config.architecture
        self.operations = source.place.operations
        for name in architecture.required:
            source.shape(name)  # or it is reported as missing
        self.config, self.layer = config, layer
        self.query_parts = 2 if architecture.gated_queries else 1
        query = layer.heads * layer.head_size * self.query_parts
        self.widths = [query, layer.kv_heads * layer.head_size, layer.kv_heads * layer.value_size]
        if source.has("attn_qkv"):
            self.inputs = [source.linear("attn_qkv", sum(self.widths), config.hidden_size)]
        else:
            names = ("attn_q", "attn_k", "attn_v")
            self.inputs = [
                source.linear(name, width, config.hidden_size) for name, width in zip(names, self.widths, strict=True)
            ]
        mixed = layer.heads * layer.value_size
        self.output_gate = self._gate(source, config, mixed)
        self.output = source.linear("attn_output", config.hidden_size, mixed)
        self.head_norms = [
            Norm.of_heads(source, "attn_q_norm", layer.heads, layer.head_size, config),
            Norm.of_heads(source, "attn_k_norm", layer.kv_heads, layer.head_size, config),
        ]
        if architecture.bare_head_norm and not layer.rotary:
            self.head_norms = [None, None]
        sub_norm = source.has("attn_sub_norm")
        self.sub_norm = Norm.of_heads(source, "attn_sub_norm", 1, mixed, config) if sub_norm else None
        self.sinks = source.optional_vector("attn_sinks.weight", layer.heads)
        self.slopes = (
            alibi_slopes(layer.heads, config.alibi_bias).to(source.place.device) if config.alibi_bias else None
        )
        power = -1.0 if architecture.attention_scale == "inverse" else -0.5
        self.scale = config.attention_scale or layer.head_size**power
        growing = config.temperature and not (config.temperature.unrotated and layer.rotary)
        self.temperature = config.temperature if growing else None
        self.cache = KeyValueSpec(layer.kv_heads, layer.head_size, layer.value_size)

    def forward(self, x: torch.Tensor | Prepared, step: Step, cache: KeyValueCache) -> torch.Tensor:
        """x (T, hidden) -> (T, hidden); writes the batch's keys and values into the cache."""
        config, layer, batch = self.config, self.layer, step.batch
        architecture = config.architecture
        gate: torch.Tensor | None = None
        linears = [*self.inputs, self.output_gate] if self.output_gate else self.inputs
        products = project(x, linears, step.precision)
        if self.output_gate:
            gate = products.pop()
        q, k, v = products if len(products) == 3 else products[0].split(self.widths, dim=1)
        if config.query_key_clamp:
            q, k, v = (y.clamp(-config.query_key_clamp, config.query_key_clamp) for y in (q, k, v))
        q = q.view(len(x), layer.heads, -1)
        if self.query_parts == 2:
            q, gate = q.split(layer.head_size, dim=2)
            q, gate = q.contiguous(), gate.reshape(len(x), -1)
        k = k.view(len(x), layer.kv_heads, -1)
        v = v.view(len(x), layer.kv_heads, -1)
        cos, sin = step.angles(layer.rotary)
        interleaved = architecture.rotary == "interleaved"
        if architecture.head_norm_last:  # too rare for an operation of its own
            q, k = (rotated(y, cos, sin, interleaved) for y in (q, k))
            cos, sin = step.angles(None)
        q, k = (norm.of_rows(y) if norm else y for y, norm in zip((q, k), self.head_norms, strict=True))
        if self.temperature:
            q = q * step.growth(self.temperature)
        last = gate is None and not self.sub_norm
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
            causal=architecture.causal,
            window=layer.window,
            chunked=architecture.window_chunked,
            soft_cap=config.attention_soft_cap,
            sinks=self.sinks,
            slopes=self.slopes,
            key_scales=cache.key_scales,
            value_scales=cache.value_scales,
            fresh=Fresh(k, v, cos, sin, batch.slots, interleaved),
            prepare=last,
        )
        if not last:
            mixed = mixed.view(len(x), -1)
        if gate is not None:
            mixed.view(len(x), gate.shape[1], -1).mul_(gate.sigmoid_()[..., None])
        if self.sub_norm:
            mixed = self.sub_norm(mixed, prepare=step.precision)
        (y,) = project(mixed, [self.output], step.precision)
        return y if config.value_scale == 1.0 else y.mul_(config.value_scale)

    def _gate(self, source: TensorSource, config: ModelConfig, mixed: int) -> Linear | None:
        """What scales the attention's result, element by element or head by head."""
        if not source.has("attn_gate"):
            return None
        rows = self.layer.heads if source.shape("attn_gate")[0] == self.layer.heads else mixed
        return source.linear("attn_gate", rows, config.hidden_size)


def alibi_slopes(heads: int, largest_bias: float) -> torch.Tensor:
    """ALiBi's slope of each head (H,): powers that fall from head to head (Press et al., 2108.12409).

    Where the number of heads is no power of two, the heads beyond it take the odd powers of half the step.
    """
    power = 1 << (heads.bit_length() - 1)
    first, between = (2.0 ** (-largest_bias / count) for count in (power, 2 * power))
    return torch.tensor([first ** (h + 1) if h < power else between ** (2 * (h - power) + 1) for h in range(heads)])
