"""Recurrent layers in the forms of real files: sparse metadata, older layouts of matrices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support import parity, relative_error

from trichord import LLM, GGUFFile
from trichord.errors import ModelError

COMMON = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
COMMON += ("attention.head_count_kv", "attention.layer_norm_rms_epsilon")
HEADS = ("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base")
STATES = ("ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank")
GROUPS = (*STATES, "ssm.group_count")
EXPERTS = ("expert_count", "expert_used_count", "expert_feed_forward_length")
LATENT = ("attention.q_lora_rank", "attention.kv_lora_rank", "attention.key_length_mla", "attention.value_length_mla")
# What the converters write of each architecture, besides what all files have.
KEYS = {
    "qwen35-dense": (*HEADS, *GROUPS, "rope.dimension_sections"),
    "qwen3next-moe": (*HEADS, *GROUPS, *EXPERTS),
    "mamba-dense": STATES,
    "mamba2-dense": GROUPS,
    "jamba-dense": (*HEADS[:2], *STATES),
    "falcon-h1-dense": (*HEADS, *GROUPS),
    "granitehybrid-dense": (*HEADS, *GROUPS, "logit_scale", "residual_scale", "rope.scaling.finetuned"),
    "nemotron_h-dense": (*HEADS, *GROUPS),
    "lfm2-dense": (*HEADS, "shortconv.l_cache", "attention.sliding_window"),
    "lfm2moe-moe": (*HEADS, *EXPERTS, "shortconv.l_cache", "expert_gating_func", "leading_dense_block_count"),
    "deepseek2-moe": (*HEADS, *EXPERTS, *LATENT, "expert_gating_func"),
    "minicpm3-dense": (*HEADS, *LATENT),
    "kimi-linear-moe": (*HEADS, *EXPERTS, *LATENT, "kda.head_dim", "ssm.conv_kernel", "expert_gating_func"),
    "plamo2-dense": (*HEADS, *STATES),
    "minimax-01-moe": (*HEADS, *EXPERTS, "residual_scale"),
}
Fields = dict[str, Any]
Tensors = dict[str, np.ndarray]


def rewritten(source: Path, target: Path, change: Callable[[Fields, Tensors], None]) -> Path:
    """A copy of a file of float32 tensors whose metadata (below the architecture) and tensors `change` has changed."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    prefix = f"{architecture}."
    fields = {key: field.contents() for key, field in reader.fields.items() if key.startswith(prefix)}
    fields = {key.removeprefix(prefix): value for key, value in fields.items() if value not in ([], -1)}
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    change(fields, tensors)
    writer = gguf.GGUFWriter(target, architecture)
    for key, value in fields.items():
        kind = type(value[0] if isinstance(value, list) else value)
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[kind]
        (writer.add_array if isinstance(value, list) else add)(prefix + key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    return LLM(path, device="cpu", precision="exact", max_sequences=1).logits(tokens)


def reference(name: str) -> tuple[Path, np.ndarray, np.ndarray]:
    path = parity(f"archs/{name}.gguf")
    with np.load(path.with_suffix(".npz")) as archive:
        return path, archive["tokens"], archive["logits"]


@pytest.mark.parametrize("name", KEYS)
def test_the_keys_that_real_files_have_suffice(name, tmp_path):
    path, tokens, expected = reference(name)

    def sparse(fields: Fields, tensors: Tensors) -> None:
        for key in set(fields) - {*COMMON, *KEYS[name]}:
            del fields[key]
        # Most write the number of heads once, and only those of keys and values for each layer.
        if isinstance(fields["attention.head_count"], list):
            fields["attention.head_count"] = max(fields["attention.head_count"])
        if name.startswith("mamba"):
            fields.update({"attention.head_count": 0, "feed_forward_length": 0})
            del fields["attention.head_count_kv"]

    assert relative_error(logits(rewritten(path, tmp_path / "sparse.gguf", sparse), tokens), expected) < 1e-5


def test_what_a_key_needs_may_lie_together(tmp_path):
    """Early files of Qwen3-Next hold queries, keys, values and gates of one key after another in one matrix."""
    path, tokens, expected = reference("qwen3next-moe")

    def joined(fields: Fields, tensors: Tensors) -> None:
        mixed, gate = tensors.pop("blk.0.attn_qkv.weight"), tensors.pop("blk.0.attn_gate.weight")
        parts = [*np.split(mixed, [256, 512]), gate]
        tensors["blk.0.ssm_in.weight"] = np.concatenate([part[key * 128 :][:128] for key in (0, 1) for part in parts])

    assert relative_error(logits(rewritten(path, tmp_path / "joined.gguf", joined), tokens), expected) < 1e-5


def test_norms_without_gains(tmp_path):
    """Falcon Mamba normalises step sizes, b and c, as its metadata say, by no tensors: as by gains of one."""
    path, tokens, _ = reference("mamba-dense")

    def flagged(fields: Fields, tensors: Tensors) -> None:
        fields["ssm.dt_b_c_rms"] = True

    def with_gains(fields: Fields, tensors: Tensors) -> None:
        for layer in (0, 1):
            for name, size in (("dt", 2), ("b", 128), ("c", 128)):
                tensors[f"blk.{layer}.ssm_{name}_norm.weight"] = np.ones(size, np.float32)

    ours, theirs = (
        logits(rewritten(path, tmp_path / f"{change.__name__}.gguf", change), tokens)
        for change in (flagged, with_gains)
    )
    assert relative_error(ours, theirs) < 1e-6
    assert relative_error(ours, logits(path, tokens)) > 1e-3


def test_granite_does_not_turn_where_its_metadata_say_so(tmp_path):
    path = parity("archs/granitehybrid-dense.gguf")

    def unturned(fields: Fields, tensors: Tensors) -> None:
        fields["rope.scaling.finetuned"] = False

    llm = LLM(rewritten(path, tmp_path / "unturned.gguf", unturned), device="cpu", max_sequences=1)
    assert llm.config.layers[0].rotary is None and LLM(path, device="cpu").config.layers[0].rotary is not None


def test_experts_behind_a_projection(tmp_path):
    """Nemotron 3's experts work on a projection of the stream: here on a rotation of it, which they undo."""
    path, tokens, expected = reference("lfm2moe-moe")
    rng = np.random.default_rng(0)
    down, up = (np.linalg.qr(rng.standard_normal((64, 64)))[0].astype(np.float32) for _ in range(2))

    def rotated(fields: Fields, tensors: Tensors) -> None:
        tensors.update({"blk.1.ffn_latent_down.weight": down, "blk.1.ffn_latent_up.weight": up})
        for side in ("gate", "up"):
            tensors[f"blk.1.ffn_{side}_exps.weight"] = tensors[f"blk.1.ffn_{side}_exps.weight"] @ down.T
        tensors["blk.1.ffn_down_exps.weight"] = up.T @ tensors["blk.1.ffn_down_exps.weight"]

    assert relative_error(logits(rewritten(path, tmp_path / "rotated.gguf", rotated), tokens), expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("jamba-dense", "blk.1.ssm_conv1d.weight"),
        ("nemotron_h-dense", "blk.1.ssm_conv1d.weight"),
        ("nemotron_h-dense", "blk.0.attn_output.weight"),
        ("mamba2-dense", "blk.1.ssm_d"),
        ("kimi-linear-moe", "blk.1.ssm_g_b.weight"),
        ("qwen35-dense", "blk.0.ssm_norm.weight"),
    ],
)
def test_a_missing_tensor_is_named(name, tensor, tmp_path):
    path = rewritten(parity(f"archs/{name}.gguf"), tmp_path / "missing.gguf", lambda _, tensors: tensors.pop(tensor))
    assert tensor not in GGUFFile(path).tensors
    with pytest.raises(ModelError, match=tensor.replace(".", r"\.")):
        LLM(path, device="cpu")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mamba2-dense", {"ssm.group_count": 3}, "2 heads in 3 groups cannot share 128"),
        ("mamba2-dense", {"ssm.inner_size": 0}, "cannot share 0 channels"),
        ("mamba-dense", {"ssm.inner_size": 0}, "cannot share 0 channels"),
        ("plamo2-dense", {"ssm.time_step_rank": 3}, "3 heads cannot share 128 channels"),
        ("qwen35-dense", {"ssm.group_count": 3}, "2 heads of 128 cannot share 3 keys"),
        ("qwen35-dense", {"ssm.state_size": 0}, "2 heads of 0"),
        ("qwen35-dense", {"ssm.inner_size": 512}, "do not make an inner size of 512"),
        ("deepseek2-moe", {"rope.dimension_count": 32}, "leaves 64 elements of keys to turn"),
    ],
)
def test_sizes_that_do_not_add_up(name, changes, message, tmp_path):
    path = rewritten(parity(f"archs/{name}.gguf"), tmp_path / "odd.gguf", lambda fields, _: fields.update(changes))
    with pytest.raises(ModelError, match=message):
        LLM(path, device="cpu")
