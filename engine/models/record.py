"""The record of an architecture: the vocabulary for what differs between decoder families.

What the file itself shows needs no field: fused or separate projections, biases, a tied output matrix, norms of
queries and keys, attention sinks, dense layers before those with experts, shared experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from trichord.dispatch import Activation, Gating

BARE = ("bare",)
"""In place of a norm's names: a norm without tensors."""


@dataclass(frozen=True)
class Routing:
    """How tokens choose their experts, and what becomes of these."""

    gating: Gating = "softmax"
    gating_told: bool = False
    """Whether the metadata's expert_gating_func counts, if there is one."""
    normalize: bool | None = False
    """Whether the weights of the chosen experts are divided by their sum; None: the file's metadata says."""
    scaled: bool = False
    """Whether the weights are multiplied by the metadata's expert_weights_scale."""
    weights_first: bool = False
    """Whether an expert's input, not its output, is multiplied by its weight."""
    early: bool = False
    """Whether the router reads the layer's input, before its norm, instead of what the experts read."""
    clamp: float | None = None
    """The bound of the experts' activations and of what gates them, unless the metadata has one (swiglu_clamp_exp)."""
    company: float = 1.0
    """What the sum of the experts and of a network for all tokens beside them (a shared one, or a dense one) is
    multiplied by."""
    dense: bool = False
    """Whether a dense network of the same layer works beside the experts; otherwise the file's is not used."""


@dataclass(frozen=True)
class Temperature:
    """Queries grow with their position p, by 1 + scale * log(1 + floor((p + offset) / length)).

    The metadata's attention.temperature_scale and temperature_length count where they are there.
    """

    scale: float = 0.0
    length: int = 0
    """0: the context before it was stretched."""
    offset: int = 0
    unrotated: bool = False
    """Only queries of layers without rotation grow."""


@dataclass(frozen=True)
class Refinement:
    """What is different in files whose metadata has `value` (None: anything but 0) under `key`."""

    key: str
    value: int | str | None
    changes: dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A decoder family, by its `general.architecture`."""

    name: str
    refined: tuple[Refinement, ...] = ()
    required: tuple[str, ...] = ()
    """Tensors of attention that other architectures do without."""
    unused: tuple[str, ...] = ()
    """Tensors below a layer's prefix (or below none) that llama.cpp accepts in a file and does not use."""

    # Norms: tensors' names, of which the first that the file has counts; no names, no norm; BARE, one without tensors.
    norm: Literal["rms", "layer"] = "rms"
    embedding_norm: tuple[str, ...] = ()
    output_norm: tuple[str, ...] = ("output_norm",)
    attention_norm: tuple[str, ...] = ("attn_norm",)
    attention_post_norm: tuple[str, ...] = ()
    feed_forward_norm: tuple[str, ...] = ("ffn_norm",)
    feed_forward_post_norm: tuple[str, ...] = ()
    post_norm_epsilon: float | None = None
    """The epsilon of the norms after the blocks; None: that of all norms."""
    parallel: bool | Literal["metadata", "without_norm"] = False
    """The feed-forward network reads the layer's input instead of the attention's output ("without_norm": where it
    has no norm of its own)."""

    # Attention
    rotary: Literal["interleaved", "halves", "none"] = "halves"
    """Pairs (2i, 2i+1), or (i, i + R/2), or positions enter in another way."""
    unrotated: Literal["never", "full_attention"] | int = "never"
    """Layers without rotation: those without a window, or every n-th; none in models without windows."""
    dense_rotated: bool = False
    """The leading layers without experts turn in any case."""
    window_every: int = 0
    """Of so many layers all but the last see a sliding window (1: all do); 0: none. The metadata may say otherwise."""
    full_attention_first: bool = False
    """Of so many layers the first, not the last, sees everything."""
    window_size: int = 0
    """The size of the window where the metadata has none."""
    window_chunked: bool = False
    """A window does not slide but starts anew at every multiple of its size."""
    window_base: float | None = None
    """Layers with a window turn unstretched, by this base if the metadata has none (0: the model's); None: as all, but
    by the metadata's base for them."""
    head_norm: Literal["rms", "layer"] = "rms"
    head_norm_last: bool = False
    """Queries and keys are normalised after the rotation."""
    bare_head_norm: bool = False
    """Queries and keys of layers with rotation are normalised also where the file has no gain for them."""
    temperature: Temperature | None = None
    gated_queries: bool = False
    """The query projection holds a gate beside each head's query, which scales the attention's result."""
    latent: bool = False
    """Multi-head latent attention: all heads' keys and values come from one short vector a position."""
    attention_scale: Literal["root", "inverse", "root_share", "metadata"] = "root"
    """Scores are divided by the root of the head's size, by the size, by the root of a head's share of the embedding,
    or multiplied by the metadata's number, if it has one."""
    clamped: bool = False
    """Queries, keys and values are bounded by the metadata's attention.clamp_kqv, if it has one."""
    alibi: float | None = None
    """Scores fall with the distance (ALiBi) by the metadata's attention.max_alibi_bias, or this; 0: by none."""
    attention_soft_cap: float | None = None
    """Attention scores are capped by the metadata's attn_logit_softcapping, or this; None: never. 0: not by default."""
    logit_soft_cap: float | None = None
    """The same of logits, by its final_logit_softcapping."""
    causal: bool = True

    # Feed-forward
    activation: Activation = "silu"
    experts: Routing = Routing()

    # Layers that remember a state instead of keys and values
    recurrent: Literal["mamba", "mamba2", "delta_net", "kimi_delta_net", "short_convolution", "lightning"] | None = None
    """The block of layers with its tensors; `beside_attention`: they have attention, too."""
    beside_attention: bool = False
    single_blocks: bool = False
    """A layer is one block behind its attention_norm: recurrent, attention, or a feed-forward network, as its tensors
    say."""

    # The stream
    normed_stream: bool = False
    """The norms after the blocks are of the stream with their contribution, and replace it."""
    normed_input_kept: bool = False
    """A block's output is added to its normalised input, times the residual_scale, instead of to the stream."""
    token_types: bool = False
    """The first row of token_types is added to every embedding: all tokens belong to the first of two segments."""
    learned_positions: bool = False
    """The embedding of a token's position (position_embd), where the file has one, is added to its own."""
    embedding_scale: float | Literal["sqrt_width"] | None = None
    """Embeddings are multiplied by the metadata's embedding_scale, or by this."""
    embedding_skip: bool = False
    """Every layer adds the (normalised) embedding, times its layer_output_scale."""
    residual_scale: float | None = None
    """Contributions to the stream are multiplied by the metadata's residual_scale, or by this / sqrt(layers)."""
    logit_scale: Literal["multiply", "divide"] | None = None
    """What happens to the logits with the metadata's logit_scale."""
    default_logit_scale: float = 1.0
    """What logits are multiplied by without one."""
    default_logit_width: int = 0
    """The same: this over the embedding's width; 0: default_logit_scale."""


def describe(architecture: Architecture) -> list[str]:
    """What is special of an architecture, in a few words each."""
    words = {
        "layer norm": architecture.norm == "layer",
        "reads both ways": not architecture.causal,
        "parallel blocks": bool(architecture.parallel),
        "no rotation": architecture.rotary == "none",
        "ALiBi": architecture.alibi is not None,
        "windows": bool(architecture.window_every),
        "soft caps": bool(architecture.attention_soft_cap or architecture.logit_soft_cap),
        "gated queries": architecture.gated_queries,
        "latent attention": architecture.latent,
        f"{(architecture.recurrent or '').replace('_', ' ')} layers": bool(architecture.recurrent),
        architecture.activation.replace("_", " "): architecture.activation != "silu",
    }
    return [word for word, applies in words.items() if applies]
