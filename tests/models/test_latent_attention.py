"""Latent attention: the absorbed form against the plain one on the same weights, and YaRN's part in its scores."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from support import relative_error

from trichord import LLM
from trichord.cache import KeyValueSpec, LatentSpec
from trichord.errors import ModelError

VOCABULARY, HIDDEN, HEADS, RANK, TURNING, STILL, VALUE, FEED_FORWARD, CONTEXT = 40, 48, 3, 32, 8, 16, 24, 64, 256
TOKENS = np.random.default_rng(1).integers(0, VOCABULARY, 90).tolist()


def write(path: Path, absorbed: bool, yarn: float = 0.0, value: int = VALUE) -> Path:
    """One layer of DeepSeek-V2's attention, with weights from a seed; `yarn` is the context's stretch."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "deepseek2")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1 if absorbed else HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_kv_lora_rank(RANK)
    writer.add_rope_dimension_count(TURNING)
    writer.add_key_length(RANK + TURNING if absorbed else STILL + TURNING)
    writer.add_value_length(RANK if absorbed else VALUE)
    if absorbed:
        writer.add_key_length_mla(STILL + TURNING)
        writer.add_value_length_mla(VALUE)
    if yarn:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn)
        writer.add_rope_scaling_orig_ctx_len(CONTEXT)
        writer.add_rope_scaling_yarn_log_mul(0.0707)

    def random(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)

    def tensor(name: str, values: np.ndarray) -> None:
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(values))

    tensor("token_embd", random(VOCABULARY, HIDDEN))
    tensor("output", random(VOCABULARY, HIDDEN))
    for name, size in {"output": HIDDEN, "blk.0.attn": HIDDEN, "blk.0.ffn": HIDDEN, "blk.0.attn_kv_a": RANK}.items():
        tensor(f"{name}_norm", 1 + random(size))
    tensor("blk.0.attn_q", 4 * random(HEADS * (STILL + TURNING), HIDDEN))
    tensor("blk.0.attn_kv_a_mqa", random(RANK + TURNING, HIDDEN))
    keys, values = random(HEADS, STILL, RANK), random(HEADS, value, RANK)
    if absorbed:
        tensor("blk.0.attn_k_b", keys.transpose(0, 2, 1))
        tensor("blk.0.attn_v_b", values)
    else:
        tensor("blk.0.attn_kv_b", np.concatenate((keys, values), axis=1).reshape(-1, RANK))
    tensor("blk.0.attn_output", random(HIDDEN, HEADS * VALUE))
    tensor("blk.0.ffn_gate", random(FEED_FORWARD, HIDDEN))
    tensor("blk.0.ffn_up", random(FEED_FORWARD, HIDDEN))
    tensor("blk.0.ffn_down", random(HIDDEN, FEED_FORWARD))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path: Path, **options) -> LLM:
    return LLM(path, device="cpu", precision="exact", max_sequences=2, **options)


@pytest.mark.parametrize("yarn", [0.0, 40.0])
def test_absorbed_matrices_change_nothing(tmp_path, yarn):
    plain = load(write(tmp_path / "plain.gguf", False, yarn))
    absorbed = load(write(tmp_path / "absorbed.gguf", True, yarn), max_batch_tokens=37)
    assert plain.model.layers[0].caches == [KeyValueSpec(HEADS, STILL + TURNING, VALUE)]
    assert absorbed.model.layers[0].caches == [LatentSpec(RANK, TURNING)]
    assert relative_error(absorbed.logits(TOKENS), plain.logits(TOKENS)) < 1e-5


def test_a_latent_is_cached_once(tmp_path):
    llm = load(write(tmp_path / "absorbed.gguf", True))
    (cache,) = llm._engine.caches[0]
    assert cache.keys.shape[1:] == (1, 64, TURNING + RANK) and cache.values.shape[1:] == (1, 64, RANK)
    assert cache.values.untyped_storage().data_ptr() == cache.keys.untyped_storage().data_ptr()


def test_stretched_contexts_grow_the_scores_not_the_queries(tmp_path):
    """DeepSeek-V2's own figures: mscale_all_dim 0.707 and a factor of 40 make scores 1.5896 times as large."""
    llm = load(write(tmp_path / "absorbed.gguf", True, yarn=40.0))
    (attention,) = llm.model.layers[0].mixers
    assert attention.scale * (STILL + TURNING) ** 0.5 == pytest.approx(1.5896, abs=1e-4)
    (rotary,) = llm.model.rotaries.values()
    assert rotary.magnitude == 1.0


def test_matrices_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"blk\.0\.attn_v_b\.weight"):
        load(write(tmp_path / "wrong.gguf", True, value=VALUE + 1))
