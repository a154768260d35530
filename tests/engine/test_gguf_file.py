"""The GGUF reader against files built by hand, files of GGUFWriter, and gguf.GGUFReader; then against damage."""

from __future__ import annotations

import os
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import gguf_builder as build
import numpy as np
import pytest
from gguf_builder import Tensor
from support import parity

from trichord.errors import GGUFError
from trichord.gguf_file import GGUFFile, TensorInfo
from trichord.weight_format import WeightFormat

F32, Q4_0 = 0, 2


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes bytes to a file of the test's own folder."""

    def write(content: bytes, name: str = "model.gguf") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def error_of(path: Path | str) -> str:
    with pytest.raises(GGUFError) as caught:
        GGUFFile(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


# Metadata


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (build.UINT8, 200),
        (build.INT8, -100),
        (build.UINT16, 60000),
        (build.INT16, -30000),
        (build.UINT32, 4_000_000_000),
        (build.INT32, -2_000_000_000),
        (build.FLOAT32, 0.15625),
        (build.BOOL, True),
        (build.BOOL, False),
        (build.STRING, "größer"),
        (build.UINT64, 2**64 - 1),
        (build.INT64, -(2**63)),
        (build.FLOAT64, 1e-300),
    ],
)
def test_each_value_type_alone_and_in_arrays(write: Callable[..., Path], kind: int, value: object) -> None:
    items = [build.scalar(kind, value)] * 3
    nested = build.array(build.ARRAY, [build.array(kind, items), build.array(kind, [])])
    pairs = [
        build.pair("one", kind, items[0]),
        build.pair("many", build.ARRAY, build.array(kind, items)),
        build.pair("none", build.ARRAY, build.array(kind, [])),
        build.pair("nested", build.ARRAY, nested),
        build.text("after", "still in step"),
    ]
    metadata = GGUFFile(write(build.build(pairs))).metadata
    assert metadata["one"] == value and type(metadata["one"]) is type(value)
    assert list(metadata["many"]) == [value] * 3 and len(metadata["none"]) == 0
    assert [list(inner) for inner in metadata["nested"]] == [[value] * 3, []]
    assert isinstance(metadata["many"], list if kind == build.STRING else np.ndarray)
    assert metadata["after"] == "still in step"
    assert list(metadata) == ["one", "many", "none", "nested", "after"]


@pytest.mark.parametrize("separator", [b"", b"\xff", b"\0"])
def test_strings_of_any_bytes_come_back_exactly(write: Callable[..., Path], separator: bytes) -> None:
    rng = random.Random(7)
    raw = [bytes(rng.choices(range(254), k=rng.randrange(6))) + separator for _ in range(2000)]
    raw += ["Ġthe".encode(), "\U0001f600".encode(), b"\xe2\x82", b"\xac", b"\xed\xa0\x80", b""]
    file = GGUFFile(write(build.build([build.texts("tokens", raw), build.text("one", raw[0])])))
    tokens = file.metadata["tokens"]
    assert [token.encode("utf-8", "surrogateescape") for token in tokens] == raw
    assert tokens == [item.decode("utf-8", "surrogateescape") for item in raw]
    assert file.metadata["one"].encode("utf-8", "surrogateescape") == raw[0]


def test_long_strings_and_empty_arrays_of_strings(write: Callable[..., Path]) -> None:
    values = ["x" * 70000, "", "é" * 300]
    file = GGUFFile(write(build.build([build.texts("t", values), build.texts("empty", [])])))
    assert file.metadata["t"] == values and file.metadata["empty"] == []


def test_get_and_require_check_the_type(write: Callable[..., Path]) -> None:
    pairs = [
        build.number("n", 7),
        build.pair("x", build.FLOAT32, build.scalar(build.FLOAT32, 0.5)),
        build.pair("yes", build.BOOL, b"\1"),
        build.text("s", "words"),
        build.texts("list", ["a"]),
        build.pair("numbers", build.ARRAY, build.array(build.INT32, [build.scalar(build.INT32, 4)])),
    ]
    file = GGUFFile(write(build.build(pairs)))
    assert (file.get("n", int), file.get("x", float), file.get("yes", bool), file.get("s", str)) == (
        7,
        0.5,
        True,
        "words",
    )
    widened = file.get("n", float)
    assert widened == 7.0 and type(widened) is float
    assert file.get("list", list) == ["a"] and list(file.require("numbers", list)) == [4]
    assert file.get("absent", int) is None and file.get("absent", int, 3) == 3
    with pytest.raises(GGUFError, match=r"^model.gguf: metadata key 'absent' is missing$"):
        file.require("absent", str)
    for key, kind in [("yes", int), ("yes", float), ("x", int), ("n", bool), ("n", str), ("s", list), ("list", str)]:
        with pytest.raises(GGUFError, match=f"metadata key '{key}'"):
            file.get(key, kind)


# Tensors


def test_tensor_table_and_blocks(write: Callable[..., Path]) -> None:
    rng = np.random.default_rng(1)
    matrix, experts, vector = (rng.integers(0, 256, n, np.uint8).tobytes() for n in (3 * 2 * 18, 2 * 3 * 5 * 4, 7 * 4))
    tensors = [
        Tensor("w", [64, 3], Q4_0, matrix),
        Tensor("experts", [5, 3, 2], F32, experts),
        Tensor("v", [7], F32, vector),
        Tensor("scalar", [], F32, b"\0\0\x80\x3f"),
    ]
    content = build.build([build.text("general.architecture", "x")], tensors)
    file = GGUFFile(write(content))
    assert list(file.tensors) == ["w", "experts", "v", "scalar"]
    start = content.index(matrix)
    assert file.tensors["w"] == TensorInfo("w", (3, 64), WeightFormat.Q4_0, 108, start, 0)
    assert file.tensors["experts"].shape == (2, 3, 5) and file.tensors["experts"].rows == 6
    assert file.tensors["v"].shape == (7,) and file.tensors["v"].rows == 1
    assert file.tensors["scalar"].shape == (1,)
    assert file.blocks("w").shape == (3, 36) and file.blocks("w").tobytes() == matrix
    assert file.blocks("experts").shape == (6, 20) and file.blocks("experts").tobytes() == experts
    assert file.blocks("v").shape == (1, 28) and file.blocks("v").tobytes() == vector
    with pytest.raises(GGUFError, match=r"^model.gguf: there is no tensor 'blk\.0'$"):
        file.blocks("blk.0")


def test_blocks_are_writable_views_that_never_reach_the_file_and_outlive_it(write: Callable[..., Path]) -> None:
    path = write(build.build([], [Tensor("w", [4], F32, bytes(range(16)))]))
    with GGUFFile(path) as file:
        first, second = file.blocks("w"), file.blocks("w")
        assert np.shares_memory(first, second) and first.flags.writeable
        first[0, 0] = 99
        assert second[0, 0] == 99
    assert path.read_bytes()[-16:] == bytes(range(16))
    assert first[0, 15] == 15
    with pytest.raises(GGUFError, match="closed"):
        file.blocks("w")


def test_metadata_of_a_closed_file(write: Callable[..., Path]) -> None:
    with GGUFFile(write(build.build([build.text("a", "read"), build.text("b", "unread")]))) as file:
        assert file.metadata["a"] == "read"
    assert file.metadata["a"] == "read" and list(file.metadata) == ["a", "b"]
    with pytest.raises(GGUFError, match=r"'b' cannot be read after the file was closed"):
        file.metadata["b"]


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignment(write: Callable[..., Path], alignment: int) -> None:
    tensors = [Tensor("a", [3], F32, b"a" * 12), Tensor("b", [1], F32, b"bbbb")]
    pairs = [build.number("general.alignment", alignment)]
    file = GGUFFile(write(build.build(pairs, tensors, alignment=alignment)))
    assert all(tensor.offset % alignment == 0 for tensor in file.tensors.values())
    assert file.blocks("a").tobytes() == b"a" * 12 and file.blocks("b").tobytes() == b"bbbb"


def test_versions_two_and_three_and_vocabulary_only(write: Callable[..., Path]) -> None:
    for version in (2, 3):
        file = GGUFFile(write(build.build([build.texts("t", ["a"])], version=version)))
        assert file.version == version and file.tensors == {} and file.metadata["t"] == ["a"]


def test_a_file_larger_than_memory_opens(tmp_path: Path) -> None:
    columns = 1 << 42
    header = build.build([], [Tensor("w", [columns], 24, b"")])
    path = tmp_path / "sparse.gguf"
    with open(path, "wb") as file:
        file.write(header)
        try:
            file.truncate(len(header) + columns)
        except OSError:
            pytest.skip("this file system keeps no file of 4 TB")
    with GGUFFile(path) as opened:
        assert opened.blocks("w")[0, -1] == 0


def test_importing_the_reader_does_not_import_torch() -> None:
    code = "import sys, trichord.gguf_file; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Independent writer and reader


def gguf_writer(path: Path, **options: int) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "llama", **options)
    writer.add_name("Example")
    writer.add_uint32("llama.context_length", 77)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "a", "ä"])
    writer.add_array("tokenizer.ggml.scores", [0.0, -1.5, 2.0])
    return writer


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_file_of_gguf_writer(tmp_path: Path) -> None:
    weights = np.random.default_rng(2).standard_normal((6, 96)).astype(np.float32)
    writer = gguf_writer(tmp_path / "w.gguf")
    writer.add_tensor("plain", weights)
    q8 = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("packed", q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("experts", weights.reshape(2, 3, 96).astype(np.float16))
    finish(writer)
    with GGUFFile(str(tmp_path / "w.gguf")) as file:
        assert file.require("general.architecture", str) == "llama" and file.require("llama.context_length", int) == 77
        assert file.metadata["tokenizer.ggml.tokens"] == ["<s>", "a", "ä"]
        np.testing.assert_array_equal(file.metadata["tokenizer.ggml.scores"], np.float32([0, -1.5, 2]))
        np.testing.assert_array_equal(file.blocks("plain").view(np.float32), weights)
        np.testing.assert_array_equal(file.blocks("packed"), q8)
        assert file.tensors["packed"].shape == (6, 96) and file.tensors["packed"].format is WeightFormat.Q8_0
        assert file.tensors["experts"].shape == (2, 3, 96) and file.tensors["experts"].format is WeightFormat.F16


@pytest.mark.parametrize(
    "name",
    [
        "archs/llama-dense.gguf",
        "archs/qwen3-dense.gguf",
        "archs/deepseek2-moe.gguf",
        "archs/mamba-dense.gguf",
        "quants/llama-dense-Q4_K_M.gguf",
        "tokenizers/ggml-vocab-llama-spm.gguf",
    ],
)
def test_against_gguf_reader(name: str) -> None:
    path = parity(name)
    reader, file = gguf.GGUFReader(path), GGUFFile(path)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(file.metadata) == list(fields)
    for key, field in fields.items():
        expected, actual = field.contents(), file.metadata[key]
        np.testing.assert_array_equal(actual, expected, err_msg=key)
        assert isinstance(expected, list) or type(actual) is type(expected), key
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        ours = file.tensors[tensor.name]
        assert ours.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert (ours.format.ggml_id, ours.offset, ours.nbytes) == (
            tensor.tensor_type,
            tensor.data_offset,
            tensor.n_bytes,
        )
        np.testing.assert_array_equal(file.blocks(tensor.name).ravel(), tensor.data.view(np.uint8).ravel())


# Split files


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    """Five tensors in three files, as GGUFWriter splits them."""
    writer = gguf_writer(tmp_path / "big.gguf", split_max_tensors=2)
    for index in range(5):
        writer.add_tensor(f"t{index}", np.full((2, 4), index, np.float32))
    finish(writer)
    return [tmp_path / f"big-{number:05}-of-00003.gguf" for number in (1, 2, 3)]


@pytest.mark.parametrize("given", [0, 1, 2])
def test_split_file_opens_by_any_part(split: list[Path], given: int) -> None:
    file = GGUFFile(split[given])
    assert file.parts == tuple(split) and file.path == split[given]
    assert list(file.tensors) == [f"t{index}" for index in range(5)]
    assert [tensor.part for tensor in file.tensors.values()] == [0, 0, 1, 1, 2]
    assert file.require("llama.context_length", int) == 77
    for index in range(5):
        np.testing.assert_array_equal(file.blocks(f"t{index}").view(np.float32), np.full((2, 4), index))


def test_split_file_with_a_missing_or_wrong_part(split: list[Path]) -> None:
    third = split[2].read_bytes()
    split[2].write_bytes(split[1].read_bytes())
    assert "by its name this is part 3 of 3, but its metadata has split.no 1" in error_of(split[0])
    split[2].write_bytes(third[:-4])
    assert error_of(split[0]).startswith("big-00003-of-00003.gguf: tensor 't4' ends at byte")
    split[2].unlink()
    assert "big-00003-of-00003.gguf is missing" in error_of(split[1])
    split[0].unlink()
    assert "big-00001-of-00003.gguf and 1 more is missing" in error_of(split[1])
    renamed = split[1].rename(split[1].with_name("other.gguf"))
    assert "must be called NAME-00001-of-00003.gguf" in error_of(renamed)


def test_split_file_with_a_doubled_tensor_or_a_wrong_count(write: Callable[..., Path]) -> None:
    def part(number: int, tensor: str, total: int = 2) -> Path:
        pairs = [
            build.number("split.no", number, build.UINT16),
            build.number("split.count", 2, build.UINT16),
            build.number("split.tensors.count", total, build.INT32),
        ]
        return write(build.build(pairs, [Tensor(tensor, [1], F32, b"1234")]), f"m-0000{number + 1}-of-00002.gguf")

    part(0, "a"), part(1, "a")
    assert error_of(part(0, "a")) == "m-00002-of-00002.gguf: tensor 'a' occurs twice"
    part(1, "b")
    assert "hold 2 tensors, not 3" in error_of(part(0, "a", total=3))


# What is not a readable GGUF file


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"", "is empty"),
        (b"GG", "ends after 2 bytes"),
        (b"PK\x03\x04" + b"\0" * 60, "zip archive"),
        (struct.pack("<Q", 100) + b'{"__metadata__":{}}', "safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"\x80\x02}q\0", "pickle"),
        (b"tjgg\3\0\0\0", "before GGUF"),
        (bytes(64), "starts with zeros"),
        (b"hello world, hello", "starts with b'hell'"),
        (b"GGUF", "the version ends at byte 8"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(60), "version 1 is not supported"),
        (b"GGUF" + struct.pack("<I", 4) + bytes(60), "version 4 is not supported"),
        (b"GGUF" + struct.pack("<I", 0) + bytes(60), "version 0 is not supported"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(60), "big-endian"),
    ],
)
def test_other_files(write: Callable[..., Path], start: bytes, message: str) -> None:
    said = error_of(write(start))
    assert said.startswith("model.gguf: ") and message in said


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    assert error_of(tmp_path / "absent.gguf").endswith("absent.gguf: there is no such file")
    assert "is a directory" in error_of(tmp_path)
    assert "cannot be opened" in error_of("nul\0character")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are a Unix matter")
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in error_of(tmp_path / "pipe")


def test_no_permission(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(build.build())

    def deny(*_: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", deny)  # a chmod would not stop root
    assert "permission" in error_of(path)


HUGE = 2**63
ARRAYS = build.array(build.UINT8, [b"1"])
for _ in range(5):
    ARRAYS = build.array(build.ARRAY, [ARRAYS])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (build.build(n_pairs=1), r"the metadata \(1 keys\) ends at byte 37, past the end of the file at 24"),
        (build.build(n_pairs=HUGE), "keys\\) ends at byte"),
        (build.build(n_tensors=HUGE), "the table of 9223372036854775808 tensors ends"),
        (build.build([build.text("a", "1"), build.text("a", "2")]), "metadata key 'a' occurs twice"),
        (build.build([struct.pack("<Q", HUGE) + bytes(20)]), "the name of metadata key 0 ends at byte"),
        (build.build([build.text("k" * 65536, "v")]), "the name of metadata key 0 is 65536 bytes long"),
        (build.build([build.pair("k", 13, bytes(8))]), "metadata key 'k' has value type 13"),
        (build.build([build.pair("k", build.BOOL, b"\2")]), "'k' holds a byte that is neither 0 nor 1"),
        (build.build([build.pair("k", build.ARRAY, build.array(7, [b"\0", b"\xff"]))]), "neither 0 nor 1"),
        (build.build([build.pair("k", build.ARRAY, build.array(13, [b"\0"]))]), "value type 13"),
        (build.build([build.pair("k", build.ARRAY, build.array(6, [], HUGE))]), "metadata key 'k' ends at byte"),
        (build.build([build.pair("k", build.ARRAY, build.array(8, [], HUGE))]), "metadata key 'k' ends at byte"),
        (build.build([build.pair("k", build.ARRAY, build.array(9, [], HUGE))]), "metadata key 'k' ends at byte"),
        (
            build.build([build.pair("k", build.ARRAY, build.array(8, [build.string("a"), struct.pack("<Q", HUGE)]))]),
            "metadata key 'k' ends at byte",
        ),
        (
            build.build([build.pair("k", build.ARRAY, build.array(8, [struct.pack("<Q", 2**64 - 8), bytes(8)]))]),
            "metadata key 'k' ends at byte",
        ),
        (build.build([build.pair("k", build.STRING, struct.pack("<Q", 1000))]), "metadata key 'k' ends at byte"),
        (build.build([build.pair("k", build.ARRAY, ARRAYS)]), "nests arrays more than 4 deep"),
        (
            build.build([build.pair("k", build.ARRAY, build.array(9, [build.array(0, [])] * 70000))]),
            "more than 65536 values",
        ),
        (build.build([build.number("general.alignment", 0)]), "general.alignment is 0"),
        (build.build([build.number("general.alignment", 48)]), "general.alignment is 48"),
        (build.build([build.text("general.alignment", "32")]), "'general.alignment' is of type str; int is expected"),
        (build.build([build.texts("split.count", ["2", "3"])]), "'split.count' is an array; int is expected"),
        (build.build([build.number("split.count", 65535)]), "split model in 65535 files must be called"),
        (build.build([], [Tensor("t" * 65, [1], F32, b"1234")]), "the name of tensor 0 is 65 bytes long"),
        (build.build([], [Tensor("t", [1] * 5, F32, b"1234")]), "tensor 't' has 5 dimensions"),
        (build.build([], [Tensor("t", [4, 0], F32, b"1234")]), r"tensor 't' has the shape \(0, 4\)"),
        (build.build([], [Tensor("t", [HUGE] * 4, F32, b"1234")]), "tensor 't' ends at byte"),
        (build.build([], [Tensor("t", [2**32, 2**32], F32, b"1234")]), "tensor 't' ends at byte"),
        (build.build([], [Tensor("t", [48], Q4_0, bytes(36))]), "tensor 't': a row of 48 weights is not a multiple"),
        (build.build([], [Tensor("t", [32], 31, bytes(18))]), "tensor 't' has GGML type id 31"),
        (build.build([], [Tensor("t", [32], 2**32 - 1, bytes(18))]), "type id 4294967295"),
        (build.build([], [Tensor("t", [2], F32, bytes(8), 32)]), "tensor 't' ends at byte 104, past the end of the"),
        (build.build([], [Tensor("t", [2], F32, bytes(8), 2**64 - 32)]), "tensor 't' ends at byte"),
        (
            build.build([], [Tensor("t", [2], F32, bytes(64), 16)]),
            "'t' starts at offset 16, not a multiple of 32",
        ),
        (
            build.build([], [Tensor("t", [1], F32, b"1234"), Tensor("t", [1], F32, b"1234")]),
            "tensor 't' occurs twice",
        ),
        (
            build.build([], [Tensor("a", [12], F32, bytes(96), 32), Tensor("b", [12], F32, bytes(48), 0)]),
            "tensor 'a' overlaps tensor 'b'",
        ),
        (build.build([], [Tensor("\x1b[2Jt\n", [0], F32, b"1234")]), re.escape(r"tensor '\x1b[2Jt\n' has")),
    ],
)
def test_damage(write: Callable[..., Path], content: bytes, message: str) -> None:
    said = error_of(write(content))
    assert said.startswith("model.gguf: ")
    assert re.search(message, said), said


def test_a_header_beyond_its_bound_is_refused_before_it_is_walked(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with open(path, "wb") as file:
        file.write(build.build([build.pair("k", build.ARRAY, build.array(build.STRING, [], 1 << 36))]))
        file.truncate(1 << 40)
    assert "is not read" in error_of(path)
    with open(path, "wb") as file:
        file.write(build.build(n_pairs=1 << 30))
        file.truncate(1 << 40)
    assert "the metadata (1073741824 keys) ends at byte" in error_of(path)


def small_file() -> bytes:
    nested = build.array(build.ARRAY, [build.array(build.INT16, [b"12", b"34"]), build.array(build.STRING, [])])
    pairs = [
        build.text("general.architecture", "llama"),
        build.number("general.alignment", 32),
        build.pair("b", build.BOOL, b"\1"),
        build.texts("tokens", ["<s>", "ä", ""]),
        build.pair("nested", build.ARRAY, nested),
    ]
    return build.build(pairs, [Tensor("v", [8], F32, bytes(32)), Tensor("w", [32, 2], Q4_0, bytes(range(36)))])


def read_all(path: Path) -> None:
    with GGUFFile(path) as file:
        for key in file.metadata:
            file.metadata[key]
        for name, tensor in file.tensors.items():
            assert file.blocks(name).nbytes == tensor.nbytes


def test_every_truncation_is_an_error_that_says_so(write: Callable[..., Path]) -> None:
    content = small_file()
    for length in range(len(content)):
        said = error_of(write(content[:length]))
        assert "past the end of the file" in said or length < 4, (length, said)
    read_all(write(content))


@pytest.mark.parametrize("seed", range(8))
def test_overwritten_bytes_give_a_gguf_error_or_a_readable_file(write: Callable[..., Path], seed: int) -> None:
    rng = random.Random(seed)
    content = small_file()
    errors = 0
    for _ in range(250):
        damaged = bytearray(content)
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(content))
            patch = rng.choice([bytes([rng.randrange(256)]), b"\xff" * 8, bytes(8), struct.pack("<Q", 1 << 40)])
            damaged[place : place + len(patch)] = patch
        try:
            read_all(write(bytes(damaged[: len(content)])))
        except GGUFError:
            errors += 1
    assert 25 < errors < 250
