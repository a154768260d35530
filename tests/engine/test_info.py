"""`describe` against figures worked by hand and gguf's own reader; `render` on terminals and pipes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import gguf
import gguf_builder as build
import pytest
from gguf_builder import Tensor
from support import parity

from trichord.gguf_file import GGUFFile
from trichord.info import describe, render

F32, Q8_0 = 0, 8


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def described(path: Path, content: bytes) -> dict:
    path.write_bytes(content)
    with GGUFFile(path) as file:
        return describe(file)


def shown(description: dict, stream: io.StringIO, tensors: bool = False) -> str:
    render(description, stream, tensors)
    return stream.getvalue()


@pytest.fixture
def model(tmp_path: Path) -> dict:
    heads = build.array(build.INT32, [build.scalar(build.INT32, count) for count in (4, 8)])
    pairs = [
        build.text("general.architecture", "novel"),
        build.text("general.name", "A [bold]name[/bold]\x1b[31m\n\u202e"),
        build.number("novel.context_length", 4096),
        build.number("novel.block_count", 2),
        build.number("novel.expert_count", 0),
        build.text("novel.embedding_length", "not a number"),
        build.pair("novel.attention.head_count", build.ARRAY, heads),
        build.text("tokenizer.ggml.model", "gpt2"),
        build.text("tokenizer.ggml.pre", "qwen2"),
        build.texts("tokenizer.ggml.tokens", ["a", "b", "c"]),
        build.text("tokenizer.chat_template", "{{ messages }}"),
    ]
    tensors = [
        Tensor("w", [64, 30], Q8_0, bytes(64 * 30 // 32 * 34)),
        Tensor("v", [80], F32, bytes(320)),
        Tensor("\x1b]0;title\x07", [20], F32, bytes(80)),
    ]
    return described(tmp_path / "model.gguf", build.build(pairs, tensors))


def test_describe(model: dict, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    assert json.loads(json.dumps(model)) == model
    assert (model["file"], model["parts"], model["file_bytes"]) == (str(path), ["model.gguf"], path.stat().st_size)
    assert (model["architecture"], model["gguf_version"], model["context_length"], model["layers"]) == (
        "novel",
        3,
        4096,
        2,
    )
    assert model["heads"] == [4, 8] and model["kv_heads"] is None and model["embedding_length"] is None
    assert model["tokenizer"] == {"model": "gpt2", "pre": "qwen2", "vocabulary_size": 3} and model["chat_template"]
    assert (model["parameters"], model["weight_bytes"], model["bits_per_weight"]) == (2020, 2440, 9.663)
    assert model["formats"] == [
        {"format": "Q8_0", "tensors": 1, "parameters": 1920, "bytes": 2040, "bits_per_weight": 8.5},
        {"format": "F32", "tensors": 2, "parameters": 100, "bytes": 400, "bits_per_weight": 32.0},
    ]
    assert model["tensors"][0] == {"name": "w", "shape": [30, 64], "format": "Q8_0", "bytes": 2040}


def test_plain_text(model: dict) -> None:
    lines = shown(model, io.StringIO()).splitlines()
    assert r"name            A [bold]name[/bold]\x1b[31m\n\u202e" in lines
    assert "heads           4 to 8, by layer" in lines
    assert "parameters      2.02 K (9.663 bits each)" in lines
    assert lines[-3:] == [
        "format  tensors  weights      size  bits per weight",
        "Q8_0          1   1.92 K  1.99 KiB              8.5",
        "F32           2      100     400 B               32",
    ]
    assert not any(line.startswith(("embedding", "key-value", "experts", "tensor ")) for line in lines)
    assert shown(model, io.StringIO(), tensors=True).splitlines()[-3:] == [
        "w                 Q8_0    30 x 64  1.99 KiB",
        "v                 F32          80     320 B",
        r"\x1b]0;title\x07  F32          20      80 B",
    ]


def test_untrusted_strings_cannot_drive_a_terminal(model: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    text = shown(model, Terminal(), tensors=True)
    assert r"A [bold]name[/bold]\x1b[31m\n\u202e" in text and r"\x1b]0;title\x07" in text
    assert "\x1b[31m" not in text and "\x1b]" not in text and "\x07" not in text and "\u202e" not in text


def test_vocabulary_only_and_empty_files(tmp_path: Path) -> None:
    vocabulary = described(tmp_path / "v.gguf", build.build([build.texts("tokenizer.ggml.tokens", ["a", b"\xff"])]))
    assert vocabulary["tokenizer"]["vocabulary_size"] == 2 and vocabulary["parameters"] == 0
    assert vocabulary["architecture"] is None and vocabulary["bits_per_weight"] is None
    assert "parameters     none" in shown(vocabulary, io.StringIO(), tensors=True)
    nothing = described(tmp_path / "n.gguf", build.build())
    assert "chat template  no" in shown(nothing, io.StringIO()) and "no" in shown(nothing, Terminal())


@pytest.mark.parametrize("name", ["archs/openelm-dense.gguf", "archs/mamba-dense.gguf", "quants/llama-moe-Q4_K_M.gguf"])
def test_sums_against_gguf_reader(name: str) -> None:
    path = parity(name)
    tensors = gguf.GGUFReader(path).tensors
    with GGUFFile(path) as file:
        description = describe(file)
    assert description["parameters"] == sum(int(tensor.n_elements) for tensor in tensors)
    assert description["weight_bytes"] == sum(int(tensor.n_bytes) for tensor in tensors)
    for entry in description["formats"]:
        assert entry["tensors"] == sum(tensor.tensor_type.name == entry["format"] for tensor in tensors)
    assert description["file_bytes"] == path.stat().st_size
    shown(description, io.StringIO(), tensors=True)


def test_info_does_not_import_torch() -> None:
    code = "import sys, trichord.info; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
