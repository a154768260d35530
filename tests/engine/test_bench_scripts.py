"""The benchmark scripts, on models and with figures small enough to know the answers."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest

from trichord import GGUFFile, Tokenizer
from trichord.errors import RequestError
from trichord.quantize_mix import mix_by_name

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_throughput
import bench_vs_llama_cpp
import profile_cpu
from bench_engines import EngineError, EngineProcess, LlamaBench, prompt_ids
from bench_tools import Spread, figure, table
from synthetic_model import SHAPES, tensor_formats, write_synthetic_model


@pytest.fixture(scope="module")
def tiny_f32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny-F32.gguf"
    write_synthetic_model(path, "tiny", "F32")
    return path


# What llama.cpp prints when it loads these files as published: so many tensors of each type.
@pytest.mark.parametrize(
    ("shape", "mix", "expected", "norms"),
    [
        ("tinyllama-1.1b", "Q4_K_M", {"Q4_K": 135, "Q6_K": 21}, 45),
        ("tinyllama-1.1b", "Q8_0", {"Q8_0": 156}, 45),
        ("tinyllama-1.1b", "Q4_0", {"Q4_0": 155, "Q6_K": 1}, 45),
        ("llama-3-8b", "Q4_K_M", {"Q4_K": 193, "Q6_K": 33}, 65),
        ("llama-3-8b", "Q5_K_M", {"Q5_K": 193, "Q6_K": 33}, 65),
    ],
)
def test_mixes_of_known_models(shape: str, mix: str, expected: dict[str, int], norms: int) -> None:
    formats = tensor_formats(SHAPES[shape], mix_by_name(mix))
    assert Counter(format.name for format in formats.values()) == expected
    assert len(SHAPES[shape].norms()) == norms


@pytest.mark.parametrize(("shape", "parameters"), [("tinyllama-1.1b", 1_100_048_384), ("llama-3-8b", 8_030_261_248)])
def test_parameters_of_known_models(shape: str, parameters: int) -> None:
    described = SHAPES[shape]
    matrices = sum(rows * columns for rows, columns in described.matrices().values())
    assert matrices + described.hidden * len(described.norms()) == parameters


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q8_0", "F16"])
def test_weights_are_at_the_scale_of_trained_ones(tmp_path: Path, mix: str) -> None:
    path = tmp_path / "tiny.gguf"
    write_synthetic_model(path, "tiny", mix)
    reader = gguf.GGUFReader(path)
    matrices = [tensor for tensor in reader.tensors if len(tensor.shape) == 2]
    assert {tensor.name: tensor.tensor_type.name for tensor in matrices} == {
        name: format.name for name, format in tensor_formats(SHAPES["tiny"], mix_by_name(mix)).items()
    }
    for tensor in matrices:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        assert values.shape == SHAPES["tiny"].matrices()[tensor.name]
        assert np.std(values) * values.shape[1] ** 0.5 == pytest.approx(1, abs=0.05)
        assert len(np.unique(values, axis=0)) > 64  # rows repeat, but not one a tensor


def test_the_vocabulary_encodes_text(tiny_f32: Path) -> None:
    with GGUFFile(tiny_f32) as file:
        tokenizer = Tokenizer.from_gguf(file)
        ids = tokenizer.encode("Grüße!")
        assert max(ids) < SHAPES["tiny"].vocabulary
        assert tokenizer.decode(ids).strip() == "Grüße!"


@pytest.mark.parametrize(("shape", "mix"), [("tinier", "Q8_0"), ("tiny", "Q9_0")])
def test_unknown_names_are_refused(tmp_path: Path, shape: str, mix: str) -> None:
    with pytest.raises(RequestError, match="there are"):
        write_synthetic_model(tmp_path / "model.gguf", shape, mix)
    assert not list(tmp_path.iterdir())


def test_spread_takes_the_median() -> None:
    assert Spread.of([3, 1, 10, 2]) == Spread(2.5, 1, 10)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (25.83, "25.8"), (1.0, "1.00"), (0.0123456, "0.0123"), (1234.5, "1234"), (0.000123, "1.23e-04")],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert figure(value) == text


def test_tables_are_aligned() -> None:
    assert table(["test", "x"], [["a", "100"], ["longer", "2"]]).splitlines() == [
        "| test   |   x |",
        "| ------ | --: |",
        "| a      | 100 |",
        "| longer |   2 |",
    ]


def test_prompts_repeat_by_seed_and_differ_between_seeds() -> None:
    assert prompt_ids(64, 32000, 1) == prompt_ids(64, 32000, 1)
    assert prompt_ids(64, 32000, 1)[0] != prompt_ids(64, 32000, 2)[0]
    assert all(259 <= token < 512 for token in prompt_ids(100, 512, 0))
    assert set(prompt_ids(20, 8, 0)) <= set(range(8))


def test_throughput(tiny_f32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    sizes = ["--prompt", "20", "--generate", "4", "--batch", "1", "3", "--runs", "3"]
    assert bench_throughput.main([str(tiny_f32), *sizes, "--device", "cpu", "--json", str(report)]) == 0
    result = json.loads(report.read_text())
    assert [(test["name"], test["tokens"]) for test in result["tests"]] == [("pp20", 20), ("tg4", 4), ("tg4 x 3", 12)]
    for test in result["tests"]:
        assert len(test["runs"]) == 3
        assert test["seconds"]["median"] == sorted(test["runs"])[1]
        assert test["tokens_per_second"]["high"] == test["tokens"] / min(test["runs"])
    matrices = [tensor for tensor in gguf.GGUFReader(tiny_f32).tensors if len(tensor.shape) == 2]
    assert result["weight_bytes"] == sum(int(tensor.n_bytes) for tensor in matrices)
    assert result["peak_bytes"] > result["weight_bytes"]
    shown = capsys.readouterr().out
    assert "| tg4 x 3 |" in shown
    assert figure(result["tests"][2]["tokens_per_second"]["median"]) in shown


@pytest.mark.parametrize("arguments", [["missing.gguf"], ["--synthetic", "tiny:Q9_0"]])
def test_throughput_says_what_is_wrong(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_throughput.main(arguments) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_comparison_says_how_to_get_a_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_vs_llama_cpp.main(["model.gguf", "--llama-bench", str(tmp_path / "missing")]) == 1
    assert "pip install llama-cpp-python" in capsys.readouterr().err


def _llama_bench(folder: Path, body: str) -> str:
    """A program that answers as llama-bench does."""
    path = folder / "llama-bench"
    path.write_text(f"#!{sys.executable}\nimport json, sys\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(os.name == "nt", reason="runs a script as a program")
def test_comparison(tiny_f32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # 1000 tokens a second for prompts, 250 for generation.
    binary = _llama_bench(
        tmp_path,
        "p, n = (int(sys.argv[sys.argv.index(flag) + 1]) for flag in ('-p', '-n'))\n"
        "print(json.dumps([{'avg_ns': p * 1e6 + n * 4e6, 'build_commit': 'abc', 'build_number': 7}]))",
    )
    report = tmp_path / "report.json"
    sizes = ["--prompt", "20", "--generate", "4", "--runs", "2", "--threads", "1"]
    assert bench_vs_llama_cpp.main([str(tiny_f32), *sizes, "--llama-bench", binary, "--json", str(report)]) == 0
    (result,) = json.loads(report.read_text())
    assert result["versions"]["llama.cpp"] == "llama-bench abc (build 7)"
    figures = result["figures"]
    assert figures["pp20, tokens/s"]["llama.cpp"] == pytest.approx([1000, 1000])
    assert figures["tg4, tokens/s"]["llama.cpp"] == pytest.approx([250, 250])
    rows = {tuple(line.split("|")[1:3]): line.split("|")[3:-1] for line in capsys.readouterr().out.splitlines()}
    for (quantity, precision), cells in ((tuple(map(str.strip, key)), cells) for key, cells in rows.items() if key):
        if quantity in figures:
            ratios = [a / b for a, b in zip(*(figures[quantity][e] for e in (precision, "llama.cpp")), strict=True)]
            shown = [figure(min(ratios)), figure(sum(ratios) / 2), figure(max(ratios))]
            assert [cell.strip() for cell in cells[2:]] == shown


@pytest.mark.skipif(os.name == "nt", reason="runs a script as a program")
def test_a_failing_llama_bench_is_one_sentence(tmp_path: Path) -> None:
    binary = _llama_bench(tmp_path, "sys.exit('error: failed to load model')")
    with pytest.raises(EngineError, match="gave no measurement: error: failed to load model"):
        LlamaBench(binary, "model.gguf", 1).prompt(16, seed=0)


def test_an_engine_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"missing\.gguf"):
        EngineProcess(sys.executable, "trichord", model=str(tmp_path / "missing.gguf"), threads=1)
    with pytest.raises(EngineError, match="cannot be started"):
        EngineProcess(str(tmp_path / "python"), "trichord", model="model.gguf")


def test_a_profile_accounts_for_the_whole_time(tiny_f32: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("numba")
    assert profile_cpu.main([str(tiny_f32), "--context", "64", "--generate", "3"]) == 0
    printed = capsys.readouterr().out
    assert "A prompt of 65 tokens" in printed
    for part in printed.split("## ")[1:]:
        rows = [line.split("|")[1:-1] for line in part.split("\n\n")[1].splitlines()[2:]]
        shares = {name.strip(): float(share.strip().rstrip("%")) for name, _, share in rows}
        assert sum(shares.values()) == pytest.approx(100, abs=0.5)
        assert min(shares.values()) >= 0
    assert {"products", "attention", "norms", "rounding of activations"} <= set(shares)  # of a step, all of it kernels
    assert profile_cpu.main([str(tiny_f32), "--generate", "100000"]) == 1
    assert "must hold --generate 100000" in capsys.readouterr().err
