"""Which blocks mix a layer's tokens: attention of one kind or another, a recurrent block, both, or none."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from trichord.cache import CacheSpec, KeyValueSpec
from trichord.dispatch import Prepared
from trichord.models.attention import Attention
from trichord.models.config import LayerConfig, ModelConfig
from trichord.models.delta_net import GatedDeltaNet, KimiDeltaNet
from trichord.models.latent_attention import LatentAttention
from trichord.models.lightning import LightningAttention
from trichord.models.linear import TensorSource, project
from trichord.models.mamba import Mamba, Mamba2
from trichord.models.short_convolution import ShortConvolution
from trichord.models.step import Step


class Mixer(Protocol):
    """A block that moves something from token to token of a sequence, through a cache of its kind."""

    cache: CacheSpec

    def forward(self, x: torch.Tensor | Prepared, step: Step, cache: Any) -> torch.Tensor:
        """x (T, hidden) -> (T, hidden); the cache takes the batch's tokens."""


class Projection:
    """What is left of attention whose tokens only see themselves (Nemotron 51B): its output matrix."""

    def __init__(self, source: TensorSource, config: ModelConfig, layer: LayerConfig) -> None:
        self.output = source.linear("attn_output", config.hidden_size, config.hidden_size)
        self.cache = KeyValueSpec(0, layer.head_size, layer.value_size)

    def forward(self, x: torch.Tensor | Prepared, step: Step, cache: Any) -> torch.Tensor:
        """x (T, hidden) -> (T, hidden); nothing is kept."""
        return project(x, [self.output], step.precision)[0]


# A layer has the recurrent block of its architecture where it has this tensor, or no heads.
_RECURRENT = {
    "mamba": ("ssm_conv1d", Mamba),
    "mamba2": ("ssm_conv1d", Mamba2),
    "delta_net": ("ssm_conv1d", GatedDeltaNet),
    "kimi_delta_net": ("ssm_conv1d_q", KimiDeltaNet),
    "short_convolution": ("shortconv.conv", ShortConvolution),
    "lightning": ("attn_norm_2", LightningAttention),
}


def mixers(source: TensorSource, config: ModelConfig, layer: LayerConfig) -> list[Mixer]:
    """The layer's blocks, which read the same input and whose outputs are added. Raises ModelError."""
    architecture = config.architecture
    blocks: list[Mixer] = []
    if architecture.recurrent:
        tensor, block = _RECURRENT[architecture.recurrent]
        if source.has(tensor) or not layer.heads:
            blocks.append(block(source, config, layer))
    if layer.heads and (not blocks or architecture.beside_attention):
        attention = LatentAttention if architecture.latent else Attention if layer.kv_heads else Projection
        blocks.append(attention(source, config, layer))
    return blocks
