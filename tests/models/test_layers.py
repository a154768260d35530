"""Layers that no reference file has, on a single token: attention then returns the token's own values."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from support import relative_error

from trichord import LLM
from trichord.errors import ModelError

HIDDEN, HEADS, KV_HEADS, WIDTH, VOCABULARY, EPSILON = 32, 4, 2, 48, 40, 1e-5


class Model:
    """A random model of one architecture: its tensors in float64, and the file that holds them."""

    def __init__(self, path, architecture: str, **metadata) -> None:
        self.path, self.architecture, self.rng = path, architecture, np.random.default_rng(3)
        self.metadata = {"context_length": 64, "embedding_length": HIDDEN, "attention.head_count": HEADS, **metadata}
        self.tensors: dict[str, np.ndarray] = {}
        for name in ("token_embd", "output"):
            self.add(name, VOCABULARY, HIDDEN)
        self.add("output_norm", HIDDEN)

    def add(self, name: str, *shape: int) -> None:
        values = self.rng.standard_normal(shape) * shape[-1] ** -0.5
        self.tensors[f"{name}.weight"] = values.astype(np.float32).astype(np.float64)

    def add_attention(self, layer: int) -> None:
        self.add(f"blk.{layer}.attn_norm", HIDDEN)
        for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS), ("output", HEADS)):
            self.add(f"blk.{layer}.attn_{name}", rows * HIDDEN // HEADS, HIDDEN)

    def add_feed_forward(self, layer: int) -> None:
        self.add(f"blk.{layer}.ffn_norm", HIDDEN)
        for name in ("gate", "up"):
            self.add(f"blk.{layer}.ffn_{name}", WIDTH, HIDDEN)
        self.add(f"blk.{layer}.ffn_down", HIDDEN, WIDTH)

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x) + EPSILON) * self.tensors[f"{name}.weight"]

    def times(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.tensors[f"{name}.weight"] @ x

    def values(self, layer: int, x: np.ndarray) -> np.ndarray:
        """What attention makes of a single token: each query head returns the value that it shares."""
        value = self.times(f"blk.{layer}.attn_v", x).reshape(KV_HEADS, -1)
        return value.repeat(HEADS // KV_HEADS, axis=0).ravel()

    def logits(self) -> np.ndarray:
        """The engine's logits of the token 7."""
        writer = gguf.GGUFWriter(self.path, self.architecture)
        for name, value in (self.metadata | {"attention.layer_norm_rms_epsilon": EPSILON}).items():
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add.get(type(value), writer.add_array)(f"{self.architecture}.{name}", value)
        for name, values in self.tensors.items():
            writer.add_tensor(name, values.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return LLM(self.path, precision="exact", max_sequences=1).logits([7])[0]

    def expected(self, x: np.ndarray) -> np.ndarray:
        """The logits of a stream."""
        return self.times("output", self.norm(x, "output_norm"))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_bitnet_normalises_what_its_output_matrices_read(tmp_path, activation):
    metadata = {"block_count": 1, "attention.head_count_kv": KV_HEADS, "hidden_activation": activation}
    model = Model(tmp_path / "model.gguf", "bitnet", **metadata)
    model.add_attention(0)
    model.add("blk.0.attn_sub_norm", HIDDEN)
    model.add_feed_forward(0)
    model.add("blk.0.ffn_sub_norm", WIDTH)
    x = model.tensors["token_embd.weight"][7]
    mixed = model.values(0, model.norm(x, "blk.0.attn_norm"))
    x = x + model.times("blk.0.attn_output", model.norm(mixed, "blk.0.attn_sub_norm"))
    y = model.norm(x, "blk.0.ffn_norm")
    gate = model.times("blk.0.ffn_gate", y)
    y = (silu(gate) if activation == "silu" else np.maximum(gate, 0) ** 2) * model.times("blk.0.ffn_up", y)
    x = x + model.times("blk.0.ffn_down", model.norm(y, "blk.0.ffn_sub_norm"))
    assert relative_error(model.logits(), model.expected(x)) < 1e-5


def test_deci_leaves_out_attention_or_feed_forward_networks(tmp_path):
    """Layers: a whole one, one with the output matrix in place of attention, one without attention, an empty one."""
    metadata = {"attention.head_count": [HEADS, HEADS, 0, 0], "attention.head_count_kv": [KV_HEADS, 0, 0, 0]}
    widths = [WIDTH, WIDTH, WIDTH, 0]
    model = Model(tmp_path / "model.gguf", "deci", block_count=4, feed_forward_length=widths, **metadata)
    model.add_attention(0)
    model.add("blk.1.attn_norm", HIDDEN)
    model.add("blk.1.attn_output", HIDDEN, HIDDEN)
    for layer in range(3):
        model.add_feed_forward(layer)
    x = model.tensors["token_embd.weight"][7]
    x = x + model.times("blk.0.attn_output", model.values(0, model.norm(x, "blk.0.attn_norm")))
    for layer in range(3):
        if layer == 1:
            x = x + model.times("blk.1.attn_output", model.norm(x, "blk.1.attn_norm"))
        y = model.norm(x, f"blk.{layer}.ffn_norm")
        y = silu(model.times(f"blk.{layer}.ffn_gate", y)) * model.times(f"blk.{layer}.ffn_up", y)
        x = x + model.times(f"blk.{layer}.ffn_down", y)
    assert relative_error(model.logits(), model.expected(x)) < 1e-5


def grove(path, per_group: int) -> Model:
    metadata = {"expert_count": 6, "expert_used_count": 4, "experts_per_group": per_group, "expert_group_scale": 0.05}
    model = Model(path, "grovemoe", block_count=1, **metadata, **{"attention.head_count_kv": KV_HEADS})
    model.add_attention(0)
    model.add("blk.0.ffn_norm", HIDDEN)
    model.add("blk.0.ffn_gate_inp", 6, HIDDEN)
    for suffix, count, width in (("exps", 6, WIDTH), ("chexps", 3, 16)):
        for name in ("gate", "up"):
            model.add(f"blk.0.ffn_{name}_{suffix}", count, width, HIDDEN)
        model.add(f"blk.0.ffn_down_{suffix}", count, HIDDEN, width)
    return model


def test_adjugate_experts_follow_the_experts_of_their_group(tmp_path):
    model = grove(tmp_path / "model.gguf", 2)
    x = model.tensors["token_embd.weight"][7]
    x = x + model.times("blk.0.attn_output", model.values(0, model.norm(x, "blk.0.attn_norm")))
    y = model.norm(x, "blk.0.ffn_norm")
    scores = np.exp(model.times("blk.0.ffn_gate_inp", y))
    best = np.argsort(-scores)[:4]

    def through(suffix, y, experts):
        gate, up, down = (
            model.tensors[f"blk.0.ffn_{name}_{suffix}.weight"][experts] for name in ("gate", "up", "down")
        )
        outputs = [d @ (silu(g @ y) * (u @ y)) for g, u, d in zip(gate, up, down, strict=True)]
        return sum(s * o for s, o in zip(scores[experts] / scores[experts].sum(), outputs, strict=True))

    y = through("exps", y, best)
    x = x + y + 0.05 * through("chexps", y, best[:3] // 2)  # at most as many as there are
    assert relative_error(model.logits(), model.expected(x)) < 1e-5


def test_adjugate_experts_that_do_not_fit_the_groups(tmp_path):
    with pytest.raises(ModelError, match="3 adjugate experts cannot serve 6 in groups of 3"):
        grove(tmp_path / "model.gguf", 3).logits()
