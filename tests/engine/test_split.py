"""Splitting and merging: parts as llama.cpp makes them, read by both readers, and back to the very same file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import gguf
import gguf_builder as build
import numpy as np
import pytest
from support import parity

from trichord import split
from trichord.errors import GGUFError, RequestError
from trichord.gguf_file import GGUFFile
from trichord.split import merge_files, split_file

SIZES = [100, 300, 64, 1000, 8, 8, 8]  # bytes of each tensor


def whole(path: Path, alignment: int = 32, sizes: list[int] = SIZES) -> Path:
    pairs = [
        build.text("general.architecture", "llama"),
        build.texts("tokenizer.ggml.tokens", ["a", b"\xff", "ü"]),
        build.number("general.alignment", alignment),
        build.number("llama.block_count", 7, build.UINT64),
    ]
    generator = np.random.default_rng(0)
    tensors = [build.Tensor(f"t{i}.weight", (n,), 24, generator.bytes(n)) for i, n in enumerate(sizes)]
    data = build.build(pairs, tensors, alignment=alignment)
    path.write_bytes(data + bytes(-len(data) % alignment))  # the last tensor is padded like the others
    return path


def names(path: Path) -> list[str]:
    return [tensor.name for tensor in gguf.GGUFReader(path).tensors]


@pytest.mark.parametrize("alignment", [32, 64])
@pytest.mark.parametrize(
    ("limits", "counts"),
    [
        ({"max_tensors": 3}, [3, 3, 1]),
        ({"max_tensors": 7}, [7]),
        ({"max_tensors": 1}, [1] * 7),
        ({"max_bytes": 511}, [2, 1, 1, 3]),
        ({"max_bytes": 1}, [1] * 7),
        ({"max_bytes": 10**9, "max_tensors": 5}, [5, 2]),
        ({}, [7]),
    ],
)
def test_round_trip(tmp_path: Path, alignment: int, limits: dict[str, int], counts: list[int]) -> None:
    path = whole(tmp_path / "in.gguf", alignment)
    parts = split_file(path, tmp_path / "m.gguf", **limits)
    assert [part.name for part in parts] == [f"m-{i + 1:05}-of-{len(counts):05}.gguf" for i in range(len(counts))]
    tensors = {t.name: bytes(t.data) for t in gguf.GGUFReader(path).tensors}
    read: dict[str, bytes] = {}
    for index, (part, count) in enumerate(zip(parts, counts, strict=True)):
        reader = gguf.GGUFReader(part)
        fields = {key: field.contents() for key, field in reader.fields.items() if key.startswith("split.")}
        assert fields == {"split.no": index, "split.count": len(counts), "split.tensors.count": 7}
        assert reader.fields["split.no"].types == [gguf.GGUFValueType.UINT16]
        assert reader.fields["split.tensors.count"].types == [gguf.GGUFValueType.INT32]
        assert ("llama.block_count" in reader.fields) == (index == 0)
        assert len(reader.tensors) == count
        read |= {t.name: bytes(t.data) for t in reader.tensors}
    assert read == tensors and list(read) == list(tensors)
    with GGUFFile(parts[-1]) as joined:
        assert {name: joined.blocks(name).tobytes() for name in joined.tensors} == tensors
    merge_files(parts[len(parts) // 2], tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == path.read_bytes()
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_a_model_of_llama_cpp_round_trips(tmp_path: Path) -> None:
    path = parity("quants/llama-moe-Q4_K_M.gguf")
    parts = split_file(path, tmp_path / "m", max_bytes=400_000)
    assert len(parts) > 3
    merge_files(parts[0], tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == path.read_bytes()


def test_parts_can_be_split_again(tmp_path: Path) -> None:
    path = whole(tmp_path / "in.gguf")
    parts = split_file(path, tmp_path / "a", max_tensors=2)
    again = split_file(parts[2], tmp_path / "b", max_tensors=3)
    assert [names(part) for part in again] == [["t0.weight", "t1.weight", "t2.weight"], ["t3.weight", "t4.weight",
        "t5.weight"], ["t6.weight"]]  # fmt: skip


def test_a_file_without_tensors_is_one_part(tmp_path: Path) -> None:
    path = whole(tmp_path / "in.gguf", sizes=[])
    (part,) = split_file(path, tmp_path / "m")
    with GGUFFile(part) as file:
        assert file.require("llama.block_count", int) == 7 and not file.tensors


def test_what_is_refused(tmp_path: Path) -> None:
    path = whole(tmp_path / "in.gguf")
    parts = split_file(path, tmp_path / "m", max_tensors=3)
    before = [part.read_bytes() for part in parts]
    with pytest.raises(RequestError, match=r"m-00001-of-00003.gguf: the file exists already"):
        split_file(path, tmp_path / "m", max_tensors=3)
    parts[0].unlink()
    with pytest.raises(RequestError, match=r"m-00002-of-00003.gguf: the file exists already"):
        split_file(path, tmp_path / "m", max_tensors=3)
    assert not parts[0].exists()
    with pytest.raises(GGUFError, match=r"m-00001-of-00003.gguf is missing"):
        merge_files(parts[1], tmp_path / "out.gguf")
    split_file(path, tmp_path / "m", max_tensors=3, force=True)
    assert [part.read_bytes() for part in parts] == before
    with pytest.raises(RequestError, match="cannot be replaced by what is made from it"):
        merge_files(parts[0], parts[1], force=True)
    with pytest.raises(RequestError, match="is not a part of a split model"):
        merge_files(path, tmp_path / "out.gguf")
    with pytest.raises(RequestError, match="at most 0 tensors cannot hold anything"):
        split_file(path, tmp_path / "n", max_tensors=0)
    with pytest.raises(RequestError, match="its directory does not exist"):
        split_file(path, tmp_path / "no" / "m")


def test_an_interrupted_split_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = split.GGUFStream.write

    def write(stream: split.GGUFStream, data: np.ndarray) -> None:
        original(stream, data)
        if data.nbytes == 1000:
            raise KeyboardInterrupt

    monkeypatch.setattr(split.GGUFStream, "write", write)
    with pytest.raises(KeyboardInterrupt):
        split_file(whole(tmp_path / "in.gguf"), tmp_path / "m", max_tensors=1)
    assert os.listdir(tmp_path) == ["in.gguf"]


@pytest.mark.parametrize(
    ("text", "size"), [("500M", 500_000_000), ("2G", 2 * 10**9), ("1.5g", 1_500_000_000), ("640", 640), ("3kb", 3000)]
)
def test_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    seen = []
    monkeypatch.setattr(split, "split_file", lambda *_, **options: seen.append(options["max_bytes"]) or [])
    assert split.run_split(options("split", "in.gguf", "m", "--max-size", text)) == 0
    assert seen == [size]


@pytest.mark.parametrize("text", ["", "G", "-1G", "two", "2 GiB", "1e9"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(RequestError, match="is not a size; write 500M or 2G"):
        split.run_split(options("split", "in.gguf", "m", f"--max-size={text}"))


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = whole(tmp_path / "in.gguf")
    assert split.run_split(options("split", path, tmp_path / "m", "--max-tensors", 4)) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(tmp_path / f"m-0000{i}-of-00002.gguf") for i in (1, 2)]
    assert split.run_merge(options("merge", printed[0], tmp_path / "out.gguf")) == 0
    assert (tmp_path / "out.gguf").read_bytes() == path.read_bytes()


def options(which: str, *words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    {"split": split.add_split_arguments, "merge": split.add_merge_arguments}[which](parser)
    return parser.parse_args([str(word) for word in words])
