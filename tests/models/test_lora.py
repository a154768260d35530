"""LoRA adapters against a model whose weights have the adapters' products added."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from support import relative_error
from tiny_model import FEED_FORWARD, HIDDEN, write_tiny_model

from trichord import LLM
from trichord.errors import ModelError

TOKENS = list(range(40, 60))
RANK = 3


def low_rank(seed: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((RANK, columns)) * columns**-0.5
    return a.astype(np.float32), rng.standard_normal((rows, RANK)).astype(np.float32)


ADAPTED = {
    "blk.0.attn_q.weight": low_rank(1, HIDDEN, HIDDEN),
    "blk.1.ffn_down.weight": low_rank(2, HIDDEN, FEED_FORWARD),
    "blk.1.ffn_gate.weight": low_rank(3, FEED_FORWARD, HIDDEN),
}


def write_adapter(path: Path, tensors: dict[str, np.ndarray], alpha: float, arch: str = "llama", kind="lora") -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", kind)
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pairs(adapted: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    return {
        f"{name}.lora_{side}": part for name, parts in adapted.items() for side, part in zip("ab", parts, strict=True)
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


def merged(model: Path, target: Path, factor: float) -> Path:
    """The same model with the products added to its float32 weights, in place in a copy of the file."""
    target.write_bytes(model.read_bytes())
    reader = gguf.GGUFReader(target, "r+")
    for tensor in reader.tensors:
        if tensor.name in ADAPTED:
            a, b = ADAPTED[tensor.name]
            tensor.data[...] += factor * (b.astype(np.float64) @ a.astype(np.float64))
    reader.data.flush()
    return target


@pytest.mark.parametrize(("alpha", "strength"), [(6.0, 1.0), (6.0, 0.25), (0.0, 0.5)])
def test_an_adapter_equals_merged_weights(model, tmp_path, alpha, strength):
    adapter = write_adapter(tmp_path / "adapter.gguf", pairs(ADAPTED), alpha)
    factor = strength * (alpha / RANK if alpha else 1.0)
    expected = LLM(merged(model, tmp_path / "merged.gguf", factor), precision="exact").logits(TOKENS)
    adapted = LLM(model, precision="exact", lora=[(adapter, strength)]).logits(TOKENS)
    plain = LLM(model, precision="exact").logits(TOKENS)
    assert relative_error(adapted, expected) < 2e-6
    assert relative_error(plain, expected) > 1e-2


def test_two_adapters_add_up(model, tmp_path):
    halves = [write_adapter(tmp_path / f"{i}.gguf", pairs(ADAPTED), 0.0) for i in range(2)]
    expected = LLM(merged(model, tmp_path / "merged.gguf", 1.0), precision="exact").logits(TOKENS)
    actual = LLM(model, precision="exact", lora=[(half, 0.5) for half in halves]).logits(TOKENS)
    assert relative_error(actual, expected) < 2e-6


@pytest.mark.parametrize(
    ("tensors", "arch", "kind", "sentence"),
    [
        (pairs({"blk.7.attn_q.weight": low_rank(1, HIDDEN, HIDDEN)}), "llama", "lora", "does not have"),
        (pairs({"token_embd.weight": low_rank(1, 259, HIDDEN)}), "llama", "lora", "does not multiply by"),
        (pairs({"blk.0.attn_q.weight": low_rank(1, HIDDEN, HIDDEN - 1)}), "llama", "lora", "does not fit"),
        ({"blk.0.attn_q.weight.lora_a": np.ones((2, HIDDEN), np.float32)}, "llama", "lora", "lora_b' is missing"),
        (pairs(ADAPTED), "qwen2", "lora", "architecture qwen2, not llama"),
        (pairs(ADAPTED), "llama", "control", "no LoRA adapter"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(model, tmp_path, tensors, arch, kind, sentence):
    adapter = write_adapter(tmp_path / "adapter.gguf", tensors, 1.0, arch, kind)
    with pytest.raises(ModelError, match=sentence):
        LLM(model, lora=adapter)
