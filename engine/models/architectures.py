"""The architectures: one record each, naming what differs between decoder families. The blocks interpret them.

What the file itself shows needs no field: fused or separate projections, biases, a tied output matrix, norms of queries
and keys, attention sinks, dense layers before those with experts, shared experts. Sources: the graphs of llama.cpp, which
define what a GGUF file of an architecture means.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from trichord.dispatch import Activation, Gating
from trichord.errors import ModelError


@dataclass(frozen=True)
class Routing:
    """How tokens choose their experts. True: the file's metadata says; else the value itself."""

    gating: Gating | Literal[True] = "softmax"
    normalize: bool | None = False
    """Whether the weights of the chosen experts are divided by their sum; None: the file's metadata says."""
    scaled: bool = False
    """Whether the weights are multiplied by the metadata's expert_weights_scale."""
    grouped: bool = False
    """Whether experts are chosen within the best groups of the metadata's expert_group_count."""
    weights_first: bool = False
    """Whether an expert's input, not its output, is multiplied by its weight."""


@dataclass(frozen=True)
class Architecture:
    """A decoder family, by its `general.architecture`."""

    name: str

    # Norms: tensors' names, of which the first that the file has counts; none of them, no norm.
    norm: Literal["rms", "layer"] = "rms"
    embedding_norm: tuple[str, ...] = ()
    output_norm: tuple[str, ...] = ("output_norm",)
    attention_norm: tuple[str, ...] = ("attn_norm",)
    attention_post_norm: tuple[str, ...] = ()
    feed_forward_norm: tuple[str, ...] = ("ffn_norm",)
    feed_forward_post_norm: tuple[str, ...] = ()
    bare_norms: bool = False
    """Norms have no tensors at all."""
    parallel: bool | Literal["metadata", "without_norm"] = False
    """The feed-forward network reads the layer's input instead of the attention's output ("without_norm": where it
    has no norm of its own)."""

    # Attention
    rotary: Literal["interleaved", "halves", "none"] = "halves"
    """Pairs (2i, 2i+1), or (i, i + R/2), or positions enter in another way."""
    unrotated: Literal["never", "full_attention"] | int = "never"
    """Layers without rotation: those without a window, or every n-th."""
    window_every: int = 0
    """Of so many layers all but the last see a sliding window (1: all do); 0: none. The metadata may say otherwise."""
    window_chunked: bool = False
    """A window does not slide but starts anew at every multiple of its size."""
    window_base: float = 0.0
    """Base of the rotation in layers with a window, which is not stretched either; 0: as in the others."""
    head_norm: Literal["rms", "layer"] = "rms"
    head_norm_last: bool = False
    """Queries and keys are normalised after the rotation."""
    gated_queries: bool = False
    """The query projection holds a gate beside each head's query, which scales the attention's result."""
    latent: bool = False
    """Multi-head latent attention where the file has its tensors (attn_kv_a_mqa)."""
    scale_in_metadata: bool = False
    clamped: bool = False
    alibi: bool = False
    soft_caps: bool = False
    """Attention scores and logits are capped, by the metadata's attn_ and final_logit_softcapping."""
    causal: bool = True

    # Feed-forward
    activation: Activation = "silu"
    experts: Routing = Routing()

    # Layers that remember a state instead of keys and values
    recurrent: Literal["mamba", "mamba2", "delta_net", "short_convolution"] | None = None
    """The block of layers with its tensors; `beside_attention`: they have attention, too."""
    beside_attention: bool = False

    # The stream
    learned_positions: bool = False
    """The embedding of a token's position (position_embd), where the file has one, is added to its own."""
    embedding_scale: float | Literal["sqrt_width", "metadata"] | None = None
    residual_scale: bool = False
    logit_scale: Literal["multiply", "divide"] | None = None


_LAYER_NORM = {"norm": "layer"}
_GATED_GELU = {"activation": "gelu", "embedding_scale": "sqrt_width"}
_POST_NORMS = {"attention_post_norm": ("post_attention_norm",), "feed_forward_post_norm": ("post_ffw_norm",)}

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", rotary="interleaved", experts=Routing(normalize=True)),
        Architecture("qwen2"),
        Architecture("qwen3"),
        Architecture("qwen3moe", experts=Routing(normalize=True)),
        Architecture("gemma", **_GATED_GELU),
        Architecture("gemma2", **_GATED_GELU, **_POST_NORMS, window_every=2, soft_caps=True, scale_in_metadata=True),
        Architecture("gemma3", **_GATED_GELU, **_POST_NORMS, window_every=6, window_base=1e4, scale_in_metadata=True),
        Architecture("phi3"),
        Architecture("gpt2", **_LAYER_NORM, rotary="none", learned_positions=True, activation="gelu"),
    )
}


def find_architecture(name: str) -> Architecture:
    """The record of this name. Raises ModelError, with near names, for one that is not supported."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    near = difflib.get_close_matches(name, ARCHITECTURES, n=3) or sorted(ARCHITECTURES)
    raise ModelError(f"Architecture {name!r} is not supported; supported are {', '.join(near)}.")
