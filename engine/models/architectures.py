"""The architectures: one record each. The blocks interpret them.

Sources: the graphs of llama.cpp, which define what a GGUF file of an architecture means.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

from trichord.errors import ModelError
from trichord.models.record import BARE, Architecture, Refinement, Routing, Temperature

_LAYER_NORM: dict[str, Any] = {"norm": "layer"}
_BARE_NORMS: dict[str, Any] = {"attention_norm": BARE, "feed_forward_norm": BARE, "output_norm": BARE}
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
    "embedding_scale": 1.0,
    "residual_scale": 0.0,
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
_INPUT_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")
_OUTPUT_BIAS = ("attn_output.bias",)
_BIASES = (*_OUTPUT_BIAS, "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")
_BERT: dict[str, Any] = {
    **_LAYER_NORM,
    "causal": False,
    "token_types": True,
    "embedding_norm": ("token_embd_norm",),
    "normed_stream": True,
    "attention_norm": (),
    "attention_post_norm": ("attn_output_norm",),
    "feed_forward_norm": (),
    "feed_forward_post_norm": ("layer_output_norm",),
    "output_norm": (),
}
# Granite's files say with this key whether queries and keys turn.
_TURNING_IF_TUNED = (Refinement("rope.scaling.finetuned", 0, {"rotary": "none"}),)
_HEAD_NORMS = ("attn_q_norm", "attn_k_norm")
_NORMALIZED = Routing(normalize=True)
_TOLD = Routing(gating_told=True, normalize=None, scaled=True)
_QWEN_DELTA: dict[str, Any] = {
    **_SECOND_NORM_BY_PLACE,
    "recurrent": "delta_net",
    "gated_queries": True,
    "experts": Routing(normalize=True, scaled=True),
}
_NEMOTRON_H: dict[str, Any] = {
    "recurrent": "mamba2",
    "single_blocks": True,
    "rotary": "none",
    "activation": "relu_squared",
    "experts": Routing("sigmoid", normalize=None, scaled=True),
}
_LFM2: dict[str, Any] = {
    "recurrent": "short_convolution",
    "window_every": 1,
    "output_norm": ("token_embd_norm", "output_norm"),
    "experts": Routing(gating_told=True, normalize=True),
}
_TOLD_OR_SIGMOID = Routing("sigmoid", gating_told=True, normalize=None, scaled=True)

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "afmoe", **_POST_NORMS, window_every=4, embedding_scale="sqrt_width", experts=_TOLD_OR_SIGMOID, unrotated=4
        ),
        Architecture("arcee", **_PAIRED, activation="relu_squared"),
        Architecture("arctic", **_PAIRED, experts=Routing(normalize=True, dense=True)),
        Architecture(
            "baichuan",
            rotary="none",
            refined=(Refinement("block_count", 32, _PAIRED), Refinement("block_count", 40, {"alibi": 8.0})),
        ),
        Architecture("bailingmoe", **_PAIRED, experts=Routing(normalize=None, scaled=True)),
        Architecture("bailingmoe2", experts=_TOLD_OR_SIGMOID, required=_HEAD_NORMS),
        Architecture("bert", **_BERT, rotary="none", learned_positions=True, activation="gelu_erf"),
        Architecture("nomic-bert", **_BERT),
        Architecture("bitnet", refined=(Refinement("hidden_activation", "relu2", {"activation": "relu_squared"}),)),
        Architecture(
            "bloom", **_LAYER_NORM, rotary="none", alibi=8.0, activation="gelu", embedding_norm=("token_embd_norm",)
        ),
        Architecture("chatglm", **_PAIRED),
        Architecture("codeshell", **_LAYER_NORM, activation="gelu"),
        Architecture("cogvlm", unused=("rope_freqs.weight",)),
        Architecture("command-r", **_COHERE),
        Architecture("cohere2", **_COHERE, window_every=4, unrotated="full_attention"),
        Architecture(
            "cohere2moe",
            **_COHERE,
            window_every=4,
            full_attention_first=True,
            unrotated="full_attention",
            dense_rotated=True,
            experts=replace(_TOLD_OR_SIGMOID, company=0.5),
            refined=(Refinement("attention.layer_norm_rms_epsilon", None, {"norm": "rms"}),),
        ),
        Architecture("dbrx", **_LAYER_NORM, clamped=True, feed_forward_norm=("attn_output_norm",), experts=_NORMALIZED),
        Architecture("deci", **_PAIRED),
        Architecture("deepseek", **_PAIRED, experts=Routing(scaled=True)),
        Architecture(
            "deepseek2",
            **_PAIRED,
            latent=True,
            temperature=Temperature(),
            experts=_TOLD,
            # GLM 4.7 Flash does not say how it chooses experts.
            refined=tuple(Refinement("block_count", layers, {"experts": _TOLD_OR_SIGMOID}) for layers in (47, 48)),
        ),
        Architecture("dots1", experts=_TOLD_OR_SIGMOID, required=_HEAD_NORMS),
        Architecture("dream", causal=False, unused=("output.bias",)),
        Architecture("ernie4_5", **_PAIRED, unused=_OUTPUT_BIAS),
        Architecture("ernie4_5-moe", **_PAIRED, experts=Routing(normalize=True, scaled=True), unused=_OUTPUT_BIAS),
        Architecture("exaone"),
        Architecture(
            "exaone4",
            **_ONLY_POST_NORMS,
            unrotated="full_attention",
            refined=(Refinement("block_count", 64, {"window_every": 4, "window_size": 4096}),),
            required=_HEAD_NORMS,
        ),
        Architecture("exaone-moe", window_every=4, unrotated="full_attention", experts=_TOLD_OR_SIGMOID),
        Architecture(
            "falcon",
            **_LAYER_NORM,
            parallel=True,
            attention_norm=("attn_norm_2", "attn_norm"),
            feed_forward_norm=("attn_norm",),
            activation="gelu",
        ),
        Architecture(
            "falcon-h1", recurrent="mamba2", beside_attention=True, unused=(*_OUTPUT_BIAS, "rope_freqs.weight")
        ),
        Architecture("gemma", **_GATED_GELU),
        Architecture(
            "gemma2",
            **_GATED_GELU,
            **_POST_NORMS,
            window_every=2,
            window_size=4096,
            attention_soft_cap=50.0,
            logit_soft_cap=30.0,
            refined=(Refinement("block_count", 46, {"attention_scale": "root_share"}),),
        ),
        Architecture(
            "gemma3",
            **_GATED_GELU,
            **_POST_NORMS,
            window_every=6,
            window_base=1e4,
            logit_soft_cap=0.0,
            refined=(Refinement("block_count", 62, {"attention_scale": "root_share"}),),
            required=_HEAD_NORMS,
        ),
        Architecture(
            "glm4",
            **_PAIRED,
            **_POST_NORMS,
            refined=(Refinement("rope.dimension_sections", None, {"rotary": "halves"}),),
        ),
        Architecture("glm4moe", **_SECOND_NORM_BY_PLACE, experts=_TOLD_OR_SIGMOID),
        Architecture("gpt2", **_LAYER_NORM, rotary="none", learned_positions=True, activation="gelu"),
        Architecture(
            "gpt-oss",
            **_SECOND_NORM_BY_PLACE,
            window_every=2,
            activation="swiglu_oai",
            experts=Routing(gating="softmax_of_chosen"),
            required=("attn_sinks",),
        ),
        Architecture("gptneox", **_LAYER_NORM, parallel="metadata", activation="gelu"),
        Architecture("granite", **_GRANITE, refined=_TURNING_IF_TUNED),
        Architecture(
            "granitehybrid",
            **_GRANITE,
            recurrent="mamba2",
            refined=_TURNING_IF_TUNED,
        ),
        Architecture("granitemoe", **_GRANITE),
        Architecture("granite_swa", **_GRANITE, window_every=4),
        Architecture(
            "grok",
            attention_post_norm=("attn_output_norm",),
            feed_forward_post_norm=("layer_output_norm", "post_ffw_norm"),
            attention_scale="metadata",
            attention_soft_cap=30.0,
            logit_soft_cap=0.0,
            activation="gelu",
            experts=Routing(normalize=True, scaled=True, dense=True, company=0.5**0.5),
            embedding_scale="sqrt_width",
            logit_scale="multiply",
            default_logit_scale=3**-0.5,
        ),
        Architecture("grovemoe", experts=_NORMALIZED),
        Architecture("hrm_text", **{**_BARE_NORMS, "output_norm": ()}, embedding_scale=1.0),
        Architecture("hunyuan-dense", head_norm_last=True, required=_HEAD_NORMS),
        Architecture("hunyuan-moe", head_norm_last=True, experts=_NORMALIZED, required=_HEAD_NORMS),
        Architecture("hunyuan_vl", head_norm_last=True),
        Architecture("hy_v3", experts=_TOLD_OR_SIGMOID),
        Architecture("internlm2", **_PAIRED),
        Architecture("jais", **_LAYER_NORM, rotary="none", alibi=8.0, attention_scale="inverse"),
        Architecture("jais2", **_LAYER_NORM, activation="relu_squared"),
        Architecture("jamba", recurrent="mamba", rotary="none", experts=Routing(scaled=True)),
        Architecture(
            "kimi-linear",
            recurrent="kimi_delta_net",
            latent=True,
            rotary="none",
            experts=replace(_TOLD, normalize=True),
            unused=_INPUT_BIASES,
        ),
        Architecture("lfm2", **_LFM2),
        Architecture("lfm2moe", **_LFM2),
        Architecture("llada", **_PAIRED, causal=False, unused=(*_BIASES, "rope_freqs.weight")),
        Architecture("llada-moe", causal=False),
        Architecture("llama", **_PAIRED, experts=_NORMALIZED),
        Architecture(
            "llama4",
            **_PAIRED,
            window_every=4,
            window_size=8192,
            window_chunked=True,
            unrotated=4,
            head_norm_last=True,
            bare_head_norm=True,
            temperature=Temperature(scale=0.1, length=8192, offset=1, unrotated=True),
            attention_scale="metadata",
            experts=Routing("sigmoid", scaled=True, weights_first=True),
            refined=(Refinement("expert_count", 128, {"bare_head_norm": False}),),
        ),
        Architecture("maincoder", rotary="interleaved", head_norm_last=True),
        Architecture("mamba", recurrent="mamba", single_blocks=True, rotary="none"),
        Architecture("mamba2", recurrent="mamba2", single_blocks=True, rotary="none"),
        Architecture("maple", window_every=1, unrotated="full_attention", experts=Routing(normalize=True, clamp=7.0)),
        Architecture("mellum", experts=_NORMALIZED, window_every=4, window_base=0.0),
        Architecture(
            "mimo2",
            window_every=1,
            window_base=1e4,
            experts=Routing("sigmoid", normalize=True, scaled=True),
            unused=_INPUT_BIASES,
        ),
        Architecture(
            "minicpm",
            **_PAIRED,
            embedding_scale=12.0,
            residual_scale=1.4,
            logit_scale="divide",
            experts=_NORMALIZED,
            default_logit_width=256,
        ),
        Architecture(
            "minicpm3",
            latent=True,
            embedding_scale=12.0,
            residual_scale=1.4,
            logit_scale="multiply",
            default_logit_width=256,
        ),
        Architecture(
            "minimax-01",
            recurrent="lightning",
            normed_input_kept=True,
            residual_scale=0.0,
            experts=Routing(normalize=True, scaled=True),
        ),
        Architecture("minimax-m2", experts=Routing("sigmoid", gating_told=True, normalize=True), required=_HEAD_NORMS),
        Architecture("mistral3", **_PAIRED, temperature=Temperature(), experts=_NORMALIZED),
        Architecture(
            "mpt",
            **_LAYER_NORM,
            rotary="none",
            alibi=0.0,
            clamped=True,
            head_norm="layer",
            learned_positions=True,
            activation="gelu",
            unused=("attn_k_norm.weight",),
        ),
        Architecture(
            "muse-glimmer",
            **_PAIRED,
            **_POST_NORMS,
            embedding_norm=BARE,
            post_norm_epsilon=1e-8,
            window_every=4,
            window_base=0.0,
            unrotated="full_attention",
            logit_scale="multiply",
            logit_soft_cap=30.0,
        ),
        Architecture("nanbeige", **_PAIRED),
        Architecture("nemotron", **_LAYER_NORM, activation="relu_squared"),
        Architecture("nemotron_h", **_NEMOTRON_H),
        Architecture("nemotron_h_moe", **_NEMOTRON_H),
        Architecture("olmo", **_LAYER_NORM, **_PAIRED, **_BARE_NORMS, clamped=True),
        Architecture("olmo2", **_ONLY_POST_NORMS, window_every=4, window_base=0.0, required=_HEAD_NORMS),
        Architecture("olmoe", required=_HEAD_NORMS),
        Architecture("openelm", required=_HEAD_NORMS),
        Architecture("orion", **_LAYER_NORM),
        Architecture(
            "paddleocr",
        ),
        Architecture("pangu-embedded", unused=("rope_freqs.weight",)),
        Architecture("phi2", **_LAYER_NORM, parallel=True, feed_forward_norm=(), activation="gelu"),
        Architecture("phi3"),
        Architecture("phimoe", experts=_NORMALIZED),
        Architecture("plamo", parallel=True, feed_forward_norm=()),
        Architecture("plamo2", **_POST_NORMS, recurrent="mamba"),
        Architecture("plamo3", **_POST_NORMS, window_every=8, window_base=1e4),
        Architecture("pockettts", **_LAYER_NORM, **_PAIRED, activation="gelu_erf"),
        Architecture("qwen"),
        Architecture("qwen2"),
        Architecture("qwen2moe"),
        Architecture("qwen2vl", unused=("output.bias",)),
        Architecture("qwen3", required=_HEAD_NORMS),
        Architecture("qwen3moe", experts=_NORMALIZED, required=_HEAD_NORMS),
        Architecture("qwen35", **_QWEN_DELTA),
        Architecture("qwen35moe", **_QWEN_DELTA),
        Architecture("qwen3next", **_QWEN_DELTA),
        Architecture("qwen3vl", required=_HEAD_NORMS),
        Architecture("qwen3vlmoe", experts=_NORMALIZED, required=_HEAD_NORMS),
        Architecture("refact", rotary="none", alibi=8.0, unused=_BIASES),
        Architecture("rnd1", causal=False, experts=_NORMALIZED),
        Architecture("seed_oss", **_SECOND_NORM_BY_PLACE),
        Architecture(
            "smallthinker",
            window_every=4,
            full_attention_first=True,
            unrotated="full_attention",
            activation="relu",
            experts=Routing(gating_told=True, normalize=True, scaled=True, early=True),
        ),
        Architecture("smollm3", **_PAIRED, unrotated=4),
        Architecture("spark2_5", window_every=1, activation="gelu"),
        Architecture("stablelm", **_LAYER_NORM, parallel="without_norm", head_norm="layer"),
        Architecture("starcoder", **_LAYER_NORM, rotary="none", learned_positions=True, activation="gelu"),
        Architecture("starcoder2", **_LAYER_NORM, activation="gelu"),
        Architecture(
            "talkie",
            **_BARE_NORMS,
            embedding_norm=BARE,
            head_norm_last=True,
            bare_head_norm=True,
            embedding_skip=True,
            logit_scale="multiply",
        ),
        Architecture("xverse", **_PAIRED),
    )
}


def find_architecture(name: str) -> Architecture:
    """The record of this name. Raises ModelError, with near names, for one that is not supported."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    near = difflib.get_close_matches(name, ARCHITECTURES, n=3) or sorted(ARCHITECTURES)
    raise ModelError(f"Architecture {name!r} is not supported; supported are {', '.join(near)}.")
