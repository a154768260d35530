"""Embeddings against float64: a tiny BERT computed anew, and pooling of a decoder's states."""

from __future__ import annotations

import json
import math

import gguf
import numpy as np
import pytest
from support import relative_error
from tiny_model import write_tiny_model

from trichord import LLM, SamplingParams
from trichord.cli import main
from trichord.errors import ModelError, RequestError

WIDTH, HEADS, INNER, LAYERS, VOCABULARY, CONTEXT = 32, 4, 48, 2, 50, 40
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5], list(range(40))]


def write_bert(path, seed: int = 0, pooling: int | None = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-6)
    writer.add_causal_attention(False)
    if pooling is not None:
        writer.add_uint32("bert.pooling_type", pooling)
    shapes = {"token_embd.weight": (VOCABULARY, WIDTH), "position_embd.weight": (CONTEXT, WIDTH)}
    shapes |= {"token_types.weight": (2, WIDTH)}
    norms = ["token_embd_norm"]
    for layer in range(LAYERS):
        prefix = f"blk.{layer}"
        shapes |= {f"{prefix}.attn_{name}.weight": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        shapes |= {f"{prefix}.attn_{name}.bias": (WIDTH,) for name in ("q", "k", "v", "output")}
        shapes |= {f"{prefix}.ffn_up.weight": (INNER, WIDTH), f"{prefix}.ffn_up.bias": (INNER,)}
        shapes |= {f"{prefix}.ffn_down.weight": (WIDTH, INNER), f"{prefix}.ffn_down.bias": (WIDTH,)}
        norms += [f"{prefix}.attn_output_norm", f"{prefix}.layer_output_norm"]
    shapes |= {f"{name}.{part}": (WIDTH,) for name in norms for part in ("weight", "bias")}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            tensor *= tensor.shape[1] ** -0.5
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: tensor.astype(np.float64) for name, tensor in tensors.items()}


def bert_states(w: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """Devlin et al., 1810.04805: every token sees all others; norms follow the sums."""

    def norm(x, name):
        centered = x - x.mean(-1, keepdims=True)
        scaled = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def heads(x):
        return x.reshape(len(ids), HEADS, -1).swapaxes(0, 1)

    gelu = np.vectorize(lambda value: value * 0.5 * (1 + math.erf(value / math.sqrt(2))))
    x = w["token_embd.weight"][ids] + w["position_embd.weight"][: len(ids)] + w["token_types.weight"][0]
    x = norm(x, "token_embd_norm")
    for layer in range(LAYERS):
        p = f"blk.{layer}"
        q, k, v = (heads(linear(x, f"{p}.attn_{name}")) for name in "qkv")
        scores = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(WIDTH / HEADS))
        mixed = (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(len(ids), -1)
        x = norm(x + linear(mixed, f"{p}.attn_output"), f"{p}.attn_output_norm")
        x = norm(x + linear(gelu(linear(x, f"{p}.ffn_up")), f"{p}.ffn_down"), f"{p}.layer_output_norm")
    return x


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bert_agrees_with_float64(tmp_path, device):
    weights = write_bert(tmp_path / "bert.gguf")
    llm = LLM(tmp_path / "bert.gguf", device=device, precision="exact", max_batch_tokens=4)
    vectors = llm.embed(PROMPTS, normalize=False)
    expected = np.stack([bert_states(weights, ids)[0] for ids in PROMPTS])
    assert vectors.dtype == np.float32
    assert relative_error(vectors, expected) < (1e-6 if device == "cpu" else 1e-5)


@pytest.mark.parametrize(("asked", "number"), [("mean", None), ("mean", 1), ("first", 2), ("last", 3), (None, 3)])
def test_pooling(tmp_path, asked, number):
    weights = write_bert(tmp_path / "bert.gguf", pooling=number)
    vector = LLM(tmp_path / "bert.gguf", precision="exact").embed(PROMPTS[0], pooling=asked)[0]
    states = bert_states(weights, PROMPTS[0])
    expected = {"mean": states.mean(0), "first": states[0], "last": states[-1]}[asked or "last"]
    assert relative_error(vector, expected / np.linalg.norm(expected)) < 1e-6


def test_a_decoder_embeds_by_its_last_state(tmp_path):
    llm = LLM(write_tiny_model(tmp_path / "tiny.gguf"), precision="exact", max_batch_tokens=5)
    first, second = llm.embed([[1, 2, 3, 4, 5, 6, 7], [7, 1]], normalize=False)
    # The output matrix makes logits of the very state.
    assert relative_error(llm.logits([7, 1])[-1], llm_output(tmp_path / "tiny.gguf") @ second.astype(np.float64)) < 1e-5
    assert relative_error(first, llm.embed([[1, 2, 3, 4, 5, 6, 7]], normalize=False)[0]) < 1e-6


def llm_output(path) -> np.ndarray:
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    return np.array(tensors["output.weight"], np.float64)


def test_what_is_refused(tmp_path):
    write_bert(tmp_path / "bert.gguf")
    llm = LLM(tmp_path / "bert.gguf")
    with pytest.raises(RequestError, match="does not write"):
        llm.generate([[1, 2]], SamplingParams(max_tokens=2))
    with pytest.raises(RequestError, match="empty"):
        llm.embed([[1], []])
    with pytest.raises(RequestError, match="context holds"):
        llm.embed([list(range(41))])
    with pytest.raises(RequestError, match="pooling"):
        llm.embed([[1]], pooling="max")
    write_bert(tmp_path / "ranker.gguf", pooling=4)
    with pytest.raises(ModelError, match="pooling type 4"):
        LLM(tmp_path / "ranker.gguf").embed([[1]])


def test_the_command_prints_a_vector_a_line(tmp_path, capsys):
    path = write_tiny_model(tmp_path / "tiny.gguf")
    (tmp_path / "texts").write_text("one\n\ntwo and more\n")
    assert main(["embed", str(path), "-f", str(tmp_path / "texts"), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = LLM(path).embed(["one", "two and more"])
    np.testing.assert_allclose([json.loads(line) for line in lines], expected, atol=1e-6)
