"""Configurations of files as converters write them: without the keys whose defaults an architecture knows."""

from __future__ import annotations

import math
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

from trichord import GGUFFile
from trichord.models.config import ModelConfig
from trichord.models.record import Temperature
from trichord.models.step import Step


@pytest.fixture
def configure(tmp_path):
    def configure(architecture: str, layers: int = 4, **metadata) -> ModelConfig:
        """The configuration of a file with these keys ("__" for a dot) and, if not among them, what none lacks."""
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
        keys = {"context_length": 4096, "embedding_length": 256, "attention__head_count": 4}
        keys |= {"attention__layer_norm_rms_epsilon": 1e-5, "attention__layer_norm_epsilon": 1e-5}
        for name, value in (keys | {"block_count": layers} | metadata).items():
            key = f"{architecture}.{name.replace('__', '.')}"
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add.get(type(value), writer.add_array)(key, value)
        for layer in range(layers):
            writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.zeros(1, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return ModelConfig.from_gguf(GGUFFile(tmp_path / "model.gguf"))

    return configure


def windows(config: ModelConfig) -> list[int]:
    return [layer.window for layer in config.layers]


def rotated(config: ModelConfig) -> list[bool]:
    return [layer.rotary is not None for layer in config.layers]


def test_every_sixth_layer_of_gemma3_sees_everything(configure):
    config = configure("gemma3", 12, attention__sliding_window=512, rope__freq_base=1e6)
    assert windows(config) == [512, 512, 512, 512, 512, 0] * 2
    assert [layer.rotary.base for layer in config.layers[4:6]] == [1e4, 1e6]
    assert config.logit_soft_cap == 0 and config.attention_scale == 0
    assert windows(configure("gemma3", 12)) == [0] * 12


def test_gemma2_caps_and_scales(configure):
    config = configure("gemma2")
    assert windows(config) == [4096, 0, 4096, 0]
    assert (config.attention_soft_cap, config.logit_soft_cap, config.attention_scale) == (50, 30, 0)
    assert configure("gemma2", 46, embedding_length=4608, attention__head_count=32).attention_scale == 1 / 12


def test_smallthinkers_first_layer_of_four_sees_everything_and_does_not_rotate(configure):
    config = configure("smallthinker", attention__sliding_window=4096)
    assert windows(config) == [0, 4096, 4096, 4096] and rotated(config) == [False, True, True, True]
    assert rotated(configure("smallthinker")) == [True] * 4


def test_llama4_has_windows_unless_the_file_says_none(configure):
    config = configure("llama4")
    assert windows(config) == [8192, 8192, 8192, 0] and rotated(config) == [True, True, True, False]
    assert config.temperature == Temperature(scale=0.1, length=8192, offset=1, unrotated=True)
    config = configure("llama4", attention__sliding_window=0)
    assert windows(config) == [0] * 4 and rotated(config) == [True] * 4


def test_a_pattern_of_flags(configure):
    config = configure("spark2_5", attention__sliding_window=32, attention__sliding_window_pattern=[True, False] * 2)
    assert windows(config) == [32, 0, 32, 0]


def test_dense_layers_of_cohere2moe_rotate(configure):
    config = configure(
        "cohere2moe",
        8,
        attention__sliding_window=64,
        attention__layer_norm_rms_epsilon=0.0,
        leading_dense_block_count=1,
        expert_count=8,
        expert_used_count=2,
    )
    assert rotated(config) == [True, True, True, True, False, True, True, True]
    assert config.architecture.norm == "layer" and config.experts.gating == "sigmoid"
    assert configure("cohere2moe").architecture.norm == "rms"


def test_exaone4_windows_only_where_it_is_large(configure):
    assert windows(configure("exaone4", 64))[:5] == [4096, 4096, 4096, 0, 4096]
    config = configure("exaone4", 30, attention__sliding_window=4096)
    assert windows(config) == [0] * 30 and all(rotated(config))


@pytest.mark.parametrize(
    ("architecture", "told", "gating"),
    [
        *[
            (name, 0, "sigmoid")
            for name in ("glm4moe", "dots1", "afmoe", "exaone-moe", "minimax-m2", "hy_v3", "llama4")
        ],
        *[(name, 0, "softmax") for name in ("deepseek2", "deepseek", "qwen3moe", "smallthinker")],
        ("glm4moe", 1, "softmax"),
        ("smallthinker", 2, "sigmoid"),
        ("qwen3moe", 2, "softmax"),
    ],
)
def test_gating(configure, architecture, told, gating):
    experts = {"expert_count": 8, "expert_used_count": 2}
    config = configure(architecture, **experts, **({"expert_gating_func": told} if told else {}))
    assert config.experts.gating == gating


def test_alibi(configure):
    assert [configure(name).alibi_bias for name in ("bloom", "mpt", "llama")] == [8, 0, 0]
    assert configure("mpt", attention__max_alibi_bias=4.0).alibi_bias == 4


def test_scales_of_early_minicpm_files(configure):
    config = configure("minicpm", 40, embedding_length=2304, attention__head_count=36)
    assert config.embedding_scale == 12
    assert config.residual_scale == pytest.approx(1.4 / math.sqrt(40))
    assert config.logit_scale == pytest.approx(256 / 2304)


def test_scales_of_granite(configure):
    config = configure("granite", logit_scale=8.0, residual_scale=0.25, attention__scale=0.0625, embedding_scale=12.0)
    assert (config.logit_scale, config.residual_scale) == (0.125, 0.25)
    assert (config.attention_scale, config.embedding_scale) == (0.0625, 12)
    assert not any(rotated(configure("granite", rope__scaling__finetuned=False)))
    assert rotated(configure("granite_swa", attention__rope_pattern=[1, 0, 1, 1])) == [True, False, True, True]


def test_scales_of_early_grok_files(configure):
    config = configure("grok", embedding_length=6144, attention__head_count=48, attention__key_length=128)
    assert config.embedding_scale == pytest.approx(78.38367176906169)
    assert config.logit_scale == pytest.approx(0.5773502691896257)
    assert (config.attention_soft_cap, config.logit_soft_cap) == (30, 0)


def test_clamps_of_experts(configure):
    clamps = [layer.expert_clamp for layer in configure("maple").layers]
    assert clamps == [7] * 4
    clamps = [layer.expert_clamp for layer in configure("maple", swiglu_clamp_exp=[0.0, 1.0, 2.0, 3.0]).layers]
    assert clamps == [0, 1, 2, 3]


def test_unstretched_windows(configure):
    """YaRN stretches Olmo 3's layers that see everything, and all of gpt-oss's."""
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 8.0, "rope__scaling__attn_factor": 1.2}
    for name, stretched in (("olmo2", "none"), ("gpt-oss", "yarn")):
        layers = configure(name, attention__sliding_window=128, rope__freq_base=5e5, **yarn).layers
        assert [layers[0].rotary.scaling, layers[3].rotary.scaling] == [stretched, "yarn"]
        assert [layers[0].rotary.base, layers[3].rotary.base] == [5e5, 5e5]
        assert layers[0].rotary.attention_factor == pytest.approx(1.0 if stretched == "none" else 1.2)


def test_queries_grow_with_their_position(configure):
    config = configure("mistral3", attention__temperature_scale=0.1, rope__scaling__original_context_length=16384)
    assert config.temperature == Temperature(scale=pytest.approx(0.1), length=16384)
    assert configure("mistral3").temperature is None
    step = Step(SimpleNamespace(positions=torch.tensor([0, 8190, 8191, 16383])), {}, "exact")
    growth = step.growth(Temperature(scale=0.1, length=8192, offset=1)).flatten().tolist()
    assert growth == pytest.approx([1.0, 1.0, 1.0 + 0.1 * math.log(2), 1.0 + 0.1 * math.log(3)])
