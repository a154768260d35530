"""The architectures: one record each, naming what differs between decoder families. The blocks interpret them.

What the file itself shows needs no field: fused or separate projections, biases, a tied output matrix, norms of
queries and keys, attention sinks, dense layers before those with experts, shared experts. Sources: the graphs of
llama.cpp, which define what a GGUF file of an architecture means.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal

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
class Refinement:
    """What is different in files whose metadata has `value` (None: anything but 0) under `key`."""

    key: str
    value: int | None
    changes: dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A decoder family, by its `general.architecture`."""

    name: str
    refined: tuple[Refinement, ...] = ()
    unused: tuple[str, ...] = ()
    """Tensors below a layer's prefix (or below none) that llama.cpp accepts in a file and does not use."""

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
    window_base: float | None = None
    """Layers with a window turn unstretched, by this base if the metadata has none (0: the model's); None: as all."""
    head_norm: Literal["rms", "layer"] = "rms"
    head_norm_last: bool = False
    """Queries and keys are normalised after the rotation."""
    gated_queries: bool = False
    """The query projection holds a gate beside each head's query, which scales the attention's result."""
    latent: bool = False
    """Multi-head latent attention where the file has its tensors (attn_kv_a_mqa)."""
    attention_scale: Literal["root", "inverse", "metadata"] = "root"
    """Scores are divided by the root of the head's size, by the size, or multiplied by the metadata's number."""
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


_LAYER_NORM: dict[str, Any] = {"norm": "layer"}
_GATED_GELU: dict[str, Any] = {"activation": "gelu", "embedding_scale": "sqrt_width"}
_POST_NORMS: dict[str, Any] = {
    "attention_post_norm": ("post_attention_norm",),
    "feed_forward_post_norm": ("post_ffw_norm",),
}
_ONLY_POST_NORMS: dict[str, Any] = {**_POST_NORMS, "attention_norm": (), "feed_forward_norm": ()}
_SECOND_NORM_BY_PLACE: dict[str, Any] = {"feed_forward_norm": ("post_attention_norm",)}
_PAIRED: dict[str, Any] = {"rotary": "interleaved"}
_GRANITE: dict[str, Any] = {
    **_PAIRED,
    "embedding_scale": "metadata",
    "residual_scale": True,
    "logit_scale": "divide",
    "attention_scale": "metadata",
    "experts": Routing(normalize=True),
}
_COHERE: dict[str, Any] = {
    **_LAYER_NORM,
    **_PAIRED,
    "parallel": True,
    "feed_forward_norm": (),
    "head_norm": "layer",
    "logit_scale": "multiply",
}
_OUTPUT_BIAS = ("attn_output.bias",)
_BIASES = (*_OUTPUT_BIAS, "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")
_NORMALIZED = Routing(normalize=True)
_DEEPSEEK = Routing(gating=True, normalize=None, scaled=True)

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "afmoe", **_POST_NORMS, window_every=4, embedding_scale="sqrt_width", experts=_DEEPSEEK, unrotated=4
        ),
        Architecture("arcee", **_PAIRED, activation="relu_squared"),
        Architecture(
            "baichuan",
            rotary="none",
            refined=(Refinement("block_count", 32, _PAIRED), Refinement("block_count", 40, {"alibi": True})),
        ),
        Architecture("bailingmoe", **_PAIRED, experts=Routing(normalize=None, scaled=True)),
        Architecture("bailingmoe2", experts=Routing(gating=True, normalize=None, scaled=True, grouped=True)),
        Architecture(
            "bloom", **_LAYER_NORM, rotary="none", alibi=True, activation="gelu", embedding_norm=("token_embd_norm",)
        ),
        Architecture("chatglm", **_PAIRED),
        Architecture("codeshell", **_LAYER_NORM, activation="gelu"),
        Architecture("command-r", **_COHERE),
        Architecture("cohere2", **_COHERE, window_every=4, unrotated="full_attention"),
        Architecture("dbrx", **_LAYER_NORM, clamped=True, feed_forward_norm=("attn_output_norm",), experts=_NORMALIZED),
        Architecture("deci", **_PAIRED),
        Architecture("deepseek", **_PAIRED, experts=Routing(scaled=True)),
        Architecture("dots1", experts=_DEEPSEEK),
        Architecture("dream", causal=False, unused=("output.bias",)),
        Architecture("ernie4_5", **_PAIRED, unused=_OUTPUT_BIAS),
        Architecture("ernie4_5-moe", **_PAIRED, experts=Routing(normalize=True, scaled=True), unused=_OUTPUT_BIAS),
        Architecture("exaone"),
        Architecture(
            "exaone4",
            **_ONLY_POST_NORMS,
            unrotated="full_attention",
            refined=(Refinement("block_count", 64, {"window_every": 4}),),
        ),
        Architecture("exaone-moe", window_every=4, unrotated="full_attention", experts=_DEEPSEEK),
        Architecture(
            "falcon",
            **_LAYER_NORM,
            parallel=True,
            attention_norm=("attn_norm_2", "attn_norm"),
            feed_forward_norm=("attn_norm",),
            activation="gelu",
        ),
        Architecture("gemma", **_GATED_GELU),
        Architecture(
            "gemma2", **_GATED_GELU, **_POST_NORMS, window_every=2, soft_caps=True, attention_scale="metadata"
        ),
        Architecture(
            "gemma3", **_GATED_GELU, **_POST_NORMS, window_every=6, window_base=1e4, attention_scale="metadata"
        ),
        Architecture(
            "glm4",
            **_PAIRED,
            **_POST_NORMS,
            refined=(Refinement("rope.dimension_sections", None, {"rotary": "halves"}),),
        ),
        Architecture("glm4moe", **_SECOND_NORM_BY_PLACE, experts=_DEEPSEEK),
        Architecture("gpt2", **_LAYER_NORM, rotary="none", learned_positions=True, activation="gelu"),
        Architecture(
            "gpt-oss",
            **_SECOND_NORM_BY_PLACE,
            window_every=2,
            activation="swiglu_oai",
            experts=Routing(gating="softmax_of_chosen"),
        ),
        Architecture("gptneox", **_LAYER_NORM, parallel="metadata", activation="gelu"),
        Architecture("granite", **_GRANITE),
        Architecture("granitemoe", **_GRANITE),
        Architecture("granite_swa", **_GRANITE, window_every=4),
        Architecture("hunyuan-dense", head_norm_last=True),
        Architecture("hunyuan-moe", head_norm_last=True, experts=_NORMALIZED),
        Architecture("hunyuan_vl", head_norm_last=True),
        Architecture("internlm2", **_PAIRED),
        Architecture("jais", **_LAYER_NORM, rotary="none", alibi=True, attention_scale="inverse"),
        Architecture("jais2", **_LAYER_NORM, activation="relu_squared"),
        Architecture("llada", **_PAIRED, causal=False, unused=(*_BIASES, "rope_freqs.weight")),
        Architecture("llada-moe", causal=False),
        Architecture("llama", **_PAIRED, experts=_NORMALIZED),
        Architecture("maincoder", rotary="interleaved", head_norm_last=True),
        Architecture("mellum", experts=_NORMALIZED, window_every=4, window_base=0.0),
        Architecture(
            "minicpm",
            **_PAIRED,
            embedding_scale="metadata",
            residual_scale=True,
            logit_scale="divide",
            experts=_NORMALIZED,
        ),
        Architecture("minimax-m2", experts=Routing(gating=True, normalize=True)),
        Architecture("mistral3", **_PAIRED, experts=_NORMALIZED),
        Architecture(
            "mpt",
            **_LAYER_NORM,
            rotary="none",
            alibi=True,
            clamped=True,
            head_norm="layer",
            learned_positions=True,
            activation="gelu",
            unused=("attn_k_norm.weight",),
        ),
        Architecture("nanbeige", **_PAIRED),
        Architecture("nemotron", **_LAYER_NORM, activation="relu_squared"),
        Architecture("olmo", **_LAYER_NORM, **_PAIRED, bare_norms=True, clamped=True),
        Architecture("olmo2", **_ONLY_POST_NORMS, window_every=4, window_base=0.0),
        Architecture("olmoe"),
        Architecture("openelm"),
        Architecture("orion", **_LAYER_NORM),
        Architecture(
            "paddleocr",
        ),
        Architecture("pangu-embedded", unused=("rope_freqs.weight",)),
        Architecture("phi2", **_LAYER_NORM, parallel=True, feed_forward_norm=(), activation="gelu"),
        Architecture("phi3"),
        Architecture("phimoe", experts=_NORMALIZED),
        Architecture("plamo", parallel=True, feed_forward_norm=()),
        Architecture("qwen"),
        Architecture("qwen2"),
        Architecture("qwen2moe"),
        Architecture("qwen2vl", unused=("output.bias",)),
        Architecture("qwen3"),
        Architecture("qwen3moe", experts=_NORMALIZED),
        Architecture("qwen3vl"),
        Architecture("qwen3vlmoe", experts=_NORMALIZED),
        Architecture("refact", rotary="none", alibi=True, unused=_BIASES),
        Architecture("rnd1", causal=False, experts=_NORMALIZED),
        Architecture("seed_oss", **_SECOND_NORM_BY_PLACE),
        Architecture("smollm3", **_PAIRED, unrotated=4),
        Architecture("stablelm", **_LAYER_NORM, parallel="without_norm", head_norm="layer"),
        Architecture("starcoder", **_LAYER_NORM, rotary="none", learned_positions=True, activation="gelu"),
        Architecture("starcoder2", **_LAYER_NORM, activation="gelu"),
        Architecture("xverse", **_PAIRED),
    )
}


def find_architecture(name: str) -> Architecture:
    """The record of this name. Raises ModelError, with near names, for one that is not supported."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    near = difflib.get_close_matches(name, ARCHITECTURES, n=3) or sorted(ARCHITECTURES)
    raise ModelError(f"Architecture {name!r} is not supported; supported are {', '.join(near)}.")
