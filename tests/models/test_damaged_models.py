"""Models that lack what they need are refused by name, never run to a wrong answer."""

from __future__ import annotations

import os

import pytest
from support import parity
from tiny_model import write_tiny_model

from trichord import LLM
from trichord.errors import ModelError, RequestError
from trichord.gguf_file import GGUFFile
from trichord.gguf_writer import new_files


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (b"blk.0.ffn_gate.weight", b"blk.0.ffn_gatx.weight", "'blk.0.ffn_gate.weight' is missing"),
        (b"blk.1.attn_k.weight", b"blk.1.attn_x.weight", "'blk.1.attn_k.weight' is missing"),
        (b"blk.1.attn_norm.weight", b"blk.1.attn_narm.weight", "'blk.1.attn_norm.weight' is missing"),
        (b"blk.1.ffn_up.weight", b"blk.2.ffn_up.weight", "tensors of a further one"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path, old, new, sentence):
    path = write_tiny_model(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(ModelError, match=sentence):
        LLM(path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("gpt-oss-moe", "blk.0.attn_sinks.weight"),
        ("gemma3-dense", "blk.1.attn_q_norm.weight"),
        ("llama-moe", "blk.1.ffn_gate_exps.weight"),
        ("deepseek2-moe", "blk.1.ffn_up_shexp.weight"),
    ],
)
def test_what_an_architecture_cannot_do_without(tmp_path, name, tensor):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(parity(f"archs/{name}.gguf").read_bytes().replace(tensor.encode(), tensor[:-1].encode() + b"x"))
    with pytest.raises(ModelError, match=f"{tensor}' is missing"):
        LLM(damaged)


def test_impossible_numbers_of_threads_are_refused(tmp_path):
    with pytest.raises(RequestError, match="from 1 to 1024, not 1000000"):
        LLM(write_tiny_model(tmp_path / "tiny.gguf"), threads=1_000_000)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_is_never_replaced(tmp_path):
    model = write_tiny_model(tmp_path / "tiny.gguf")
    os.mkfifo(tmp_path / "pipe")
    with (
        GGUFFile(model) as file,
        pytest.raises(RequestError, match="device or a pipe"),
        new_files(file, [tmp_path / "pipe"], 10, force=True),
    ):
        pass
    assert (tmp_path / "pipe").is_fifo()
