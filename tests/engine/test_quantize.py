"""The quantizer: blocks against ggml's own, mixes against llama-quantize's, whole files, and what can go wrong."""

from __future__ import annotations

import argparse
import errno
import io
import os
import struct
from functools import cache
from pathlib import Path

import gguf
import gguf_builder as build
import numpy as np
import pytest
from gguf import quants
from support import parity

from trichord import gguf_writer, quantize
from trichord.cpu_fallback.dequantize import dequantize_rows
from trichord.errors import GGUFError, RequestError
from trichord.gguf_file import GGUFFile
from trichord.quantize import quantize_blocks, quantize_file
from trichord.quantize_formats import _QUANTIZERS
from trichord.quantize_mix import MIXES, choose_formats, mix_by_name
from trichord.weight_format import WeightFormat as F

FORMATS = list(_QUANTIZERS)
GGUF_LACKS = {F.Q8_K, F.Q1_0, F.Q2_0}  # these are decoded by what reproduces ggml's own values in test_formats.py


def decoded(blocks: np.ndarray, format: F) -> np.ndarray:
    if format in GGUF_LACKS:
        return dequantize_rows(blocks, format)
    return quants.dequantize(blocks, gguf.GGMLQuantizationType(format.ggml_id))


@cache
def golden() -> dict[str, np.ndarray]:
    with np.load(parity("formats.npz")) as file:
        return dict(file)


def rmse(actual: np.ndarray, expected: np.ndarray, weight: np.ndarray | float = 1.0) -> float:
    return float(np.sqrt(np.mean(weight * np.square(actual.astype(np.float64) - expected))))


def gaussian(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * 0.02).astype(np.float32)


# Blocks


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_errors_are_no_larger_than_those_of_ggml(format: F) -> None:
    weights, importance = golden()["weights"], golden()["imatrix"]
    theirs = golden()[f"{format.name}.values"]
    plain = decoded(quantize_blocks(weights, format), format)
    guided = decoded(quantize_blocks(weights, format, importance), format)
    assert rmse(plain, weights) <= 1.02 * rmse(theirs, weights)
    assert rmse(guided, weights) <= 1.02 * rmse(theirs, weights)
    assert rmse(guided, weights, importance) <= 1.02 * rmse(theirs, weights, importance)


# Root-mean-square error over standard deviation of normally distributed weights: what each format loses at least, by
# its bits and the distribution, with a tenth to spare. A wrong scale, shift or bit order multiplies it.
LOSS = {
    F.Q1_0: 0.60, F.Q2_0: 0.36, F.Q4_0: 0.083, F.Q4_1: 0.071, F.Q5_0: 0.041, F.Q5_1: 0.034, F.Q8_0: 0.0053,
    F.Q2_K: 0.27, F.Q3_K: 0.147, F.Q4_K: 0.072, F.Q5_K: 0.036, F.Q6_K: 0.017, F.Q8_K: 0.0066, F.TQ1_0: 0.44,
    F.TQ2_0: 0.44, F.IQ1_S: 0.465, F.IQ1_M: 0.43, F.IQ2_XXS: 0.33, F.IQ2_XS: 0.288, F.IQ2_S: 0.243, F.IQ3_XXS: 0.18,
    F.IQ3_S: 0.132, F.IQ4_NL: 0.074, F.IQ4_XS: 0.075, F.MXFP4: 0.113, F.NVFP4: 0.094,
}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("magnitude", [1.0, 0.1, 1e3])
def test_loss_on_normally_distributed_weights(format: F, magnitude: float) -> None:
    weights = gaussian(5, 512) * np.float32(magnitude)
    if format is F.NVFP4 and magnitude != 1.0:
        pytest.skip("its 8-bit scales reach neither far")
    error = rmse(decoded(quantize_blocks(weights, format), format), weights)
    assert error <= 1.1 * LOSS[format] * 0.02 * magnitude


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_importance_moves_the_error_off_the_important_columns(format: F) -> None:
    if format in (F.Q1_0, F.Q8_0, F.Q8_K):
        pytest.skip("its signs, or its many levels, leave nothing to choose")
    weights = gaussian(16, 512, seed=1)
    importance = np.where(np.arange(512) % 16 < 4, 100.0, 1.0).astype(np.float32)
    plain = decoded(quantize_blocks(weights, format), format)
    guided = decoded(quantize_blocks(weights, format, importance), format)
    assert rmse(guided, weights, importance) < 0.995 * rmse(plain, weights, importance)


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_special_blocks(format: F) -> None:
    zeros = np.zeros((1, 256), np.float32)
    assert not decoded(quantize_blocks(zeros, format), format).any()
    for value in (0.05, -0.05):
        constant = np.full((1, 256), value, np.float32)
        got = decoded(quantize_blocks(constant, format), format)
        # A vector codebook need not hold a constant vector, nor E2M1 with an 8-bit scale every number.
        inexact = format in (F.IQ2_XXS, F.IQ3_XXS, F.IQ3_S, F.MXFP4, F.NVFP4)
        assert rmse(got, constant) <= (0.34 if inexact else 0.002) * 0.05
    sparse = np.where(np.arange(256) % 64 == 5, gaussian(1, 256), 0).astype(np.float32)
    never_active = np.zeros(256, np.float32)
    for weights, importance in (
        (sparse, None),
        (gaussian(1, 256), never_active),
        (gaussian(1, 256), never_active + 1e30),
    ):
        got = decoded(quantize_blocks(weights, format, importance), format)
        assert np.isfinite(got).all()
        assert rmse(got, weights) <= rmse(np.zeros_like(weights), weights)


@pytest.mark.parametrize("format", [F.TQ1_0, F.TQ2_0], ids=lambda f: f.name)
def test_ternary_weights_survive_exactly(format: F) -> None:
    scale = np.float32(0.046875)
    weights = np.random.default_rng(2).integers(-1, 2, (3, 512)).astype(np.float32) * scale
    np.testing.assert_array_equal(decoded(quantize_blocks(weights, format), format), weights)


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_rows_do_not_influence_each_other(format: F) -> None:
    weights = gaussian(3, 512, seed=3)
    alone = [quantize_blocks(weights[row : row + 1], format) for row in range(3)]
    np.testing.assert_array_equal(quantize_blocks(weights, format), np.concatenate(alone))


def test_floats_round_to_the_nearest_even() -> None:
    values = np.array([[1.0, 1.00390625, 1.01171875, -3.14159, 65504.0, 1e-7, 0.0, -0.0]], np.float32)
    np.testing.assert_array_equal(quantize_blocks(values, F.F16).view(np.float16), values.astype(np.float16))
    np.testing.assert_array_equal(
        quantize_blocks(values, F.BF16), quants.quantize(values, gguf.GGMLQuantizationType.BF16)
    )
    np.testing.assert_array_equal(quantize_blocks(values, F.F32).view(np.float32), values)


def test_q8_k_ends_with_the_sums_its_dot_products_read() -> None:
    block = quantize_blocks(gaussian(1, 256), F.Q8_K)[0]
    codes, sums = block[4:260].view(np.int8), block[260:].view(np.int16)
    np.testing.assert_array_equal(sums, codes.reshape(16, 16).sum(axis=1))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="not a multiple of Q4_K's block of 256"):
        quantize_blocks(gaussian(1, 128), F.Q4_K)
    with pytest.raises(ValueError, match="no quantizer for F64"):
        quantize_blocks(gaussian(1, 128), F.F64)
    for value in (np.nan, np.inf, 1e30):
        with pytest.raises(ValueError, match=r"must be finite and of magnitude 1e\+09 at most"):
            quantize_blocks(np.full((1, 256), value, np.float32), F.IQ2_XS)


# Mixes

GOLDEN_MIXES = [
    "gemma2-dense-Q4_K_M", "gemma3-dense-Q4_K_M", "llama-dense-Q4_K_M", "llama-moe-Q4_K_M", "llama-moe-MXFP4",
    "phi3-dense-Q4_K_M", "qwen2-dense-Q4_K_M", "qwen3-dense-Q4_K_M", "qwen3moe-moe-Q4_K_M", "llama-F16", "llama-BF16",
    "llama-IQ1_M", "llama-IQ1_S", "llama-IQ2_S", "llama-IQ2_XS", "llama-IQ2_XXS", "llama-IQ3_S", "llama-IQ3_XXS",
    "llama-IQ4_NL", "llama-IQ4_XS", "llama-Q1_0", "llama-Q2_0", "llama-Q2_K", "llama-Q3_K_S", "llama-Q4_0",
    "llama-Q4_1", "llama-Q4_K_S", "llama-Q5_0", "llama-Q5_1", "llama-Q5_K_S", "llama-Q6_K", "llama-Q8_0",
    "llama-TQ1_0", "llama-TQ2_0",
]  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN_MIXES)
def test_formats_are_those_llama_quantize_chose(name: str) -> None:
    mix = MIXES[name.rsplit("-")[-1].replace("MXFP4", "MXFP4_MOE")]
    pure = name.count("-") == 1  # the others are mixed
    with GGUFFile(parity(f"quants/{name}.gguf")) as file:
        assert mix.file_type == file.require("general.file_type", int)
        chosen = choose_formats(file, mix, pure, importance=True)
        assert chosen == {name: tensor.format for name, tensor in file.tensors.items()}


def model(
    path: Path, layers: int, columns: int = 256, experts: int = 0, kv_heads: int = 8, heads: int = 8, tied: bool = False
) -> Path:
    """A Llama-shaped file of F16 zeros: only its table matters."""
    pairs = [build.text("general.architecture", "llama")]
    for key, value in (
        ("block_count", layers),
        ("attention.head_count", heads),
        ("attention.head_count_kv", kv_heads),
        ("expert_count", experts),
    ):
        pairs.append(build.number(f"llama.{key}", value))
    matrices = ["attn_q", "attn_k", "attn_v", "attn_output"]
    matrices += (
        [f"ffn_{part}_exps" for part in ("gate", "up", "down")] if experts else ["ffn_gate", "ffn_up", "ffn_down"]
    )
    names = ["token_embd.weight"] + ([] if tied else ["output.weight"])
    names += [f"blk.{layer}.{matrix}.weight" for layer in range(layers) for matrix in matrices]
    tensors = []
    for name in names:
        dims = (columns, 2, experts) if "_exps" in name else (columns, 2)
        tensors.append(build.Tensor(name, dims, F.F16.ggml_id, bytes(2 * int(np.prod(dims)))))
    path.write_bytes(build.build(pairs, tensors))
    return path


def layers_in(chosen: dict[str, F], matrix: str, format: F) -> list[int]:
    return [int(name.split(".")[1]) for name, f in chosen.items() if f"{matrix}.weight" in name and f is format]


def test_more_bits_for_the_first_and_last_eighth_and_every_third_between(tmp_path: Path) -> None:
    with GGUFFile(model(tmp_path / "m.gguf", layers=16)) as file:
        chosen = choose_formats(file, MIXES["Q4_K_M"])
    expected = [0, 1, 4, 7, 10, 13, 14, 15]
    assert layers_in(chosen, "attn_v", F.Q6_K) == layers_in(chosen, "ffn_down", F.Q6_K) == expected
    assert chosen["output.weight"] is F.Q6_K
    assert {chosen["token_embd.weight"], chosen["blk.0.attn_q.weight"]} == {F.Q4_K}


@pytest.mark.parametrize(
    ("mix", "matrix", "options", "formats"),
    [
        ("Q3_K_M", "attn_v", {}, [F.Q5_K] * 2 + [F.Q4_K] * 6),
        ("Q3_K_M", "ffn_down", {}, [F.Q4_K] * 8),
        ("Q3_K_L", "attn_output", {}, [F.Q5_K] * 8),
        ("Q2_K", "attn_v", {}, [F.Q3_K] * 8),
        ("Q2_K", "attn_v", {"kv_heads": 2}, [F.Q4_K] * 8),
        ("Q4_K_S", "attn_v", {}, [F.Q5_K] * 4 + [F.Q4_K] * 4),
        ("Q4_K_S", "ffn_down", {}, [F.Q5_K] + [F.Q4_K] * 7),
        ("IQ3_XS", "ffn_gate", {}, [F.IQ3_S] + [F.IQ3_XXS] * 6 + [F.IQ3_S]),
        ("IQ3_XS", "attn_q", {}, [F.IQ3_XXS] * 8),
        ("IQ2_M", "attn_v", {}, [F.IQ3_S] * 8),
        ("IQ2_M", "ffn_down", {}, [F.IQ3_S] + [F.IQ2_S] * 7),
        ("IQ1_S", "attn_output", {}, [F.IQ2_XXS] * 8),
        ("Q4_K_M", "attn_k", {"experts": 8}, [F.Q8_0] * 8),
        ("Q4_K_M", "attn_output", {"experts": 8}, [F.Q5_K] * 8),
        ("Q4_K_M", "ffn_down_exps", {"experts": 4}, [F.Q6_K, F.Q4_K, F.Q4_K, F.Q6_K, F.Q4_K, F.Q4_K, F.Q6_K, F.Q6_K]),
        ("MXFP4_MOE", "ffn_down_exps", {"experts": 4}, [F.MXFP4] * 8),
        ("MXFP4_MOE", "attn_q", {"experts": 4}, [F.Q8_0] * 8),
    ],
)
def test_rules_by_layer_and_model(tmp_path: Path, mix: str, matrix: str, options: dict, formats: list[F]) -> None:
    with GGUFFile(model(tmp_path / "m.gguf", layers=8, **options)) as file:
        chosen = choose_formats(file, MIXES[mix])
    assert [chosen[f"blk.{layer}.{matrix}.weight"] for layer in range(8)] == formats


def test_llama_70b_gets_finer_values(tmp_path: Path) -> None:
    with GGUFFile(model(tmp_path / "m.gguf", layers=80, heads=64, kv_heads=8)) as file:
        chosen = choose_formats(file, MIXES["Q4_K_M"])
    assert {chosen[f"blk.{layer}.attn_v.weight"] for layer in range(80)} == {F.Q5_K, F.Q6_K}


@pytest.mark.parametrize(
    ("mix", "columns", "format", "output"),
    [
        ("Q4_K_M", 96, F.Q5_0, F.Q8_0),
        ("Q5_K_S", 96, F.Q5_1, F.Q8_0),
        ("IQ4_XS", 96, F.IQ4_NL, F.Q8_0),
        ("Q3_K_S", 96, F.Q4_0, F.Q8_0),
        ("Q4_0", 80, F.F16, F.F16),
        ("Q8_0", 33, F.F16, F.F16),
    ],
)
def test_rows_that_blocks_do_not_fill_fall_back(tmp_path: Path, mix: str, columns: int, format: F, output: F) -> None:
    with GGUFFile(model(tmp_path / "m.gguf", layers=1, columns=columns)) as file:
        chosen = choose_formats(file, MIXES[mix])
    assert (chosen["blk.0.attn_q.weight"], chosen["output.weight"]) == (format, output)


def test_tied_embeddings_are_treated_as_the_output_they_also_are(tmp_path: Path) -> None:
    with GGUFFile(model(tmp_path / "m.gguf", layers=1, tied=True)) as file:
        assert choose_formats(file, MIXES["Q4_K_M"])["token_embd.weight"] is F.Q6_K


def test_names_of_mixes() -> None:
    assert mix_by_name("q4_k_m") is mix_by_name("Q4_K") is MIXES["Q4_K_M"]
    numbers = {m.name.removeprefix("MOSTLY_").removeprefix("ALL_"): m.value for m in gguf.LlamaFileType}
    assert all(mix.file_type == numbers.get(name, 41) for name, mix in MIXES.items())
    with pytest.raises(RequestError, match="'Q9_K' is not a quantization type; there are F32, F16"):
        mix_by_name("Q9_K")


# Files

WEIGHTS = {
    "token_embd.weight": (40, 256),
    "blk.0.attn_norm.weight": (256,),
    "blk.0.attn_q.weight": (96, 256),
    "blk.0.ffn_gate_inp.weight": (3, 256),
    "blk.0.ffn_down_exps.weight": (3, 8, 256),
}
PAIRS = [
    build.text("general.architecture", "llama"),
    build.number("general.file_type", 0),
    build.number("llama.block_count", 1),
    build.number("llama.context_length", 2048, build.UINT64),
    build.number("llama.attention.layer_norm_rms_epsilon", 1e-5, build.FLOAT32),
    build.texts("tokenizer.ggml.tokens", ["a", "ü", b"\xff\xfe", ""]),
    build.pair("odd.arrays", build.ARRAY, build.array(build.ARRAY, [build.array(build.BOOL, [b"\0", b"\1"])])),
]


def source(path: Path, weights: dict[str, np.ndarray] | None = None, pairs: list[bytes] = PAIRS, **options) -> Path:
    weights = weights or {name: values(name) for name in WEIGHTS}
    tensors = [build.Tensor(name, w.shape[::-1], F.F32.ggml_id, w.tobytes()) for name, w in weights.items()]
    path.write_bytes(build.build(pairs, tensors, **options))
    return path


def values(name: str) -> np.ndarray:
    shape = WEIGHTS[name]
    return gaussian(int(np.prod(shape[:-1])), shape[-1], seed=len(name)).reshape(shape)


def tensors_of(path: Path) -> dict[str, tuple[F, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    return {t.name: (F.from_ggml_id(int(t.tensor_type)), np.array(t.data)) for t in reader.tensors}


def test_a_quantized_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "_PIECE", 7 * 256)  # pieces that end inside tensors and experts
    path = source(tmp_path / "in.gguf")
    report = quantize_file(path, tmp_path / "out.gguf", "q4_k_m", threads=3)
    written = tensors_of(tmp_path / "out.gguf")
    assert [name for name in written] == list(WEIGHTS)
    assert {name: format for name, (format, _) in written.items()} == {
        "token_embd.weight": F.Q6_K,
        "blk.0.attn_norm.weight": F.F32,
        "blk.0.attn_q.weight": F.Q4_K,
        "blk.0.ffn_gate_inp.weight": F.F32,
        "blk.0.ffn_down_exps.weight": F.Q6_K,
    }
    for name, (format, data) in written.items():
        rows = values(name).reshape(-1, 256)
        if format is F.F32:
            np.testing.assert_array_equal(data.reshape(rows.shape), rows)
            continue
        data = data.reshape(len(rows), -1)
        np.testing.assert_array_equal(data, quantize_blocks(rows, format))
        (entry,) = (t for t in report.tensors if t.name == name)
        assert np.sqrt(entry.squared_error / entry.weights) == pytest.approx(
            rmse(decoded(data, format), rows), rel=1e-5
        )
        assert np.sqrt(entry.squares / entry.weights) == pytest.approx(rmse(rows, np.zeros_like(rows)), rel=1e-5)
    assert report.nbytes == (tmp_path / "out.gguf").stat().st_size
    assert report.source_bytes == path.stat().st_size
    assert os.listdir(tmp_path).count("out.gguf") == 1 and len(os.listdir(tmp_path)) == 2
    with GGUFFile(tmp_path / "out.gguf") as file:
        assert {name: tensor.format for name, tensor in file.tensors.items()} == {n: f for n, (f, _) in written.items()}


def test_metadata_passes_through(tmp_path: Path) -> None:
    path = source(tmp_path / "in.gguf", pairs=[*PAIRS, build.number("general.alignment", 64)], alignment=64)
    quantize_file(path, tmp_path / "out.gguf", "Q8_0")
    before, after = (gguf.GGUFReader(p).fields for p in (path, tmp_path / "out.gguf"))
    changed = {"general.file_type": 7, "general.quantization_version": 2}
    for key, value in changed.items():
        assert after[key].contents() == value
    before, after = ({k: f for k, f in fields.items() if not k.startswith("GGUF.")} for fields in (before, after))
    assert list(after) == [*before, "general.quantization_version"]
    for key in before:
        if key not in changed:
            assert after[key].types == before[key].types
            assert [bytes(part) for part in after[key].parts] == [bytes(part) for part in before[key].parts]
    with GGUFFile(tmp_path / "out.gguf") as file:
        assert all(tensor.offset % 64 == 0 for tensor in file.tensors.values())


def test_a_real_table_quantizes_with_every_mix(tmp_path: Path) -> None:
    """Rows of 64 and 128 columns: every fallback is met. The decoded weights stay near the originals."""
    path = parity("archs/llama-dense.gguf")
    originals = {name: data for name, (_, data) in tensors_of(path).items()}
    for mix in ("Q4_K_M", "Q2_K", "IQ4_XS", "MXFP4_MOE", "Q5_1"):
        quantize_file(path, tmp_path / f"{mix}.gguf", mix)
        for name, (format, data) in tensors_of(tmp_path / f"{mix}.gguf").items():
            original = originals[name]
            got = data if format.block_size == 1 else decoded(data.reshape(-1, data.shape[-1]), format)
            assert rmse(got.reshape(original.shape), original) <= 0.12 * rmse(original, np.zeros_like(original)), name


def test_pure(tmp_path: Path) -> None:
    quantize_file(source(tmp_path / "in.gguf"), tmp_path / "out.gguf", "Q5_K_M", pure=True)
    formats = {format for format, _ in tensors_of(tmp_path / "out.gguf").values()}
    assert formats == {F.Q5_K, F.F32}


@pytest.mark.parametrize("mix", ["F16", "BF16", "F32"])
def test_plain_floats(tmp_path: Path, mix: str) -> None:
    quantize_file(source(tmp_path / "in.gguf"), tmp_path / "out.gguf", mix)
    written = tensors_of(tmp_path / "out.gguf")
    assert written["blk.0.attn_q.weight"][0] is F[mix]
    assert written["blk.0.attn_norm.weight"][0] is F.F32
    again = quantize_file(tmp_path / "out.gguf", tmp_path / "again.gguf", mix)
    assert not any(tensor.converted for tensor in again.tensors)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


def test_split_sources_become_one_file(tmp_path: Path) -> None:
    from trichord.split import split_file

    path = source(tmp_path / "in.gguf")
    parts = split_file(path, tmp_path / "part", max_tensors=2)
    quantize_file(path, tmp_path / "whole.gguf", "Q4_0")
    quantize_file(parts[1], tmp_path / "joined.gguf", "Q4_0")
    assert (tmp_path / "joined.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_requantizing_must_be_allowed(tmp_path: Path) -> None:
    quantize_file(source(tmp_path / "in.gguf"), tmp_path / "q8.gguf", "Q8_0")
    with pytest.raises(RequestError, match=r"tensor 'token_embd.weight' is quantized already \(Q8_0\)"):
        quantize_file(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_K_M")
    assert not (tmp_path / "q4.gguf").exists()
    quantize_file(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_K_M", allow_requantize=True)
    eight, four = tensors_of(tmp_path / "q8.gguf"), tensors_of(tmp_path / "q4.gguf")
    name = "blk.0.attn_q.weight"
    expected = quantize_blocks(decoded(eight[name][1], F.Q8_0), F.Q4_K)
    np.testing.assert_array_equal(four[name][1], expected)


# Importance matrices


def entries() -> dict[str, np.ndarray]:
    """Sums of squares (matrices, columns) over 5 calls; each expert has its own."""
    generator = np.random.default_rng(4)
    return {
        "blk.0.attn_q.weight": generator.uniform(0, 50, (1, 256)).astype(np.float32),
        "blk.0.ffn_down_exps.weight": generator.uniform(0, 50, (3, 256)).astype(np.float32),
    }


def write_binary(path: Path, sums: dict[str, np.ndarray]) -> Path:
    """The old form: every entry with one number of calls."""
    data = struct.pack("<i", len(sums))
    for name, value in sums.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 5, value.size) + value.tobytes()
    path.write_bytes(data + struct.pack("<ii", 5, 4) + b"text")
    return path


def write_gguf(path: Path, sums: dict[str, np.ndarray], counts: float = 5.0) -> Path:
    """The new form: a count for each matrix of an entry."""
    tensors = []
    for name, value in sums.items():
        count = np.full(len(value), counts, np.float32)
        tensors.append(build.Tensor(name + ".in_sum2", value.shape[::-1], 0, value.tobytes()))
        tensors.append(build.Tensor(name + ".counts", (1, len(value)), 0, count.tobytes()))
    path.write_bytes(build.build([build.text("general.type", "imatrix")], tensors))
    return path


@pytest.mark.parametrize("write", [write_binary, write_gguf])
def test_importance_matrices(tmp_path: Path, write) -> None:
    matrix = write(tmp_path / "imatrix", entries())
    path = source(tmp_path / "in.gguf")
    quantize_file(path, tmp_path / "out.gguf", "IQ2_XS", pure=True, imatrix=matrix)
    written = tensors_of(tmp_path / "out.gguf")
    for name, sums in entries().items():
        format, data = written[name]
        stacked = values(name).reshape(len(sums), -1, 256)
        expected = [quantize_blocks(rows, format, sums[i] / np.float32(5)) for i, rows in enumerate(stacked)]
        assert format is F.IQ2_XS
        np.testing.assert_array_equal(data.reshape(-1, data.shape[-1]), np.concatenate(expected))


def test_an_expert_that_was_never_reached_counts_columns_alike(tmp_path: Path) -> None:
    matrix = write_gguf(tmp_path / "imatrix.gguf", entries(), counts=0.0)
    quantize_file(source(tmp_path / "in.gguf"), tmp_path / "out.gguf", "Q4_K", pure=True, imatrix=matrix)
    data = tensors_of(tmp_path / "out.gguf")["blk.0.attn_q.weight"][1]
    np.testing.assert_array_equal(data, quantize_blocks(values("blk.0.attn_q.weight"), F.Q4_K))


@pytest.mark.parametrize("mix", ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"])
def test_the_coarsest_formats_need_one(tmp_path: Path, mix: str) -> None:
    path = source(tmp_path / "in.gguf")
    with pytest.raises(RequestError, match="without an importance matrix gives garbage, and there is none"):
        quantize_file(path, tmp_path / "out.gguf", mix)
    some = write_binary(tmp_path / "imatrix.dat", {"blk.9.attn_q.weight": np.ones((1, 256), np.float32)})
    with pytest.raises(RequestError, match="the one given has no entry for it"):
        quantize_file(path, tmp_path / "out.gguf", mix, imatrix=some)


def damaged_binary(path: Path) -> bytes:
    return write_binary(path, entries()).read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends early, or is no importance matrix"),
        (b"\0\0\0\0", "holds no importance matrix"),
        (b"hello, I am not a matrix at all", "ends early, or is no importance matrix"),
        (struct.pack("<ii", 1, 1 << 30), "ends early, or is no importance matrix"),
        (struct.pack("<ii", 1, -5), "ends early, or is no importance matrix"),
        (struct.pack("<ii1siif", 1, 1, b"a", 1, 1, float("nan")), "the entry of 'a' holds negative or non-finite"),
        (struct.pack("<ii1siif", 1, 1, b"a", 1, 1, -1.0), "the entry of 'a' holds negative or non-finite"),
    ],
)
def test_damaged_importance_matrices(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "imatrix.dat").write_bytes(content)
    with pytest.raises(GGUFError, match=message):
        quantize_file(source(tmp_path / "in.gguf"), tmp_path / "out.gguf", "Q4_0", imatrix=tmp_path / "imatrix.dat")


def test_an_importance_matrix_of_another_model(tmp_path: Path) -> None:
    path = source(tmp_path / "in.gguf")
    other = write_gguf(tmp_path / "imatrix.gguf", {"blk.0.attn_q.weight": np.ones((1, 128), np.float32)})
    with pytest.raises(GGUFError, match=r"'blk.0.attn_q.weight' has 128 numbers; .* needs 256"):
        quantize_file(path, tmp_path / "out.gguf", "Q4_0", imatrix=other)
    with pytest.raises(GGUFError, match="holds no importance matrix"):
        quantize_file(path, tmp_path / "out.gguf", "Q4_0", imatrix=path)
    with pytest.raises(GGUFError, match="cannot be read: No such file"):
        quantize_file(path, tmp_path / "out.gguf", "Q4_0", imatrix=tmp_path / "none.dat")


# What can go wrong


@pytest.mark.parametrize(
    ("value", "mix", "message"),
    [
        (np.nan, "Q4_0", "'blk.0.attn_q.weight' holds nan, which cannot be quantized"),
        (-np.inf, "BF16", "'blk.0.attn_q.weight' holds -inf, which cannot be quantized"),
        (1e5, "F16", r"'blk.0.attn_q.weight' holds 1e\+05, more than the 65504 that .* F16 can"),
        (-1e20, "Q6_K", r"'blk.0.attn_q.weight' holds 1e\+20, more than the 65504"),
    ],
)
def test_weights_that_cannot_be_quantized(tmp_path: Path, value: float, mix: str, message: str) -> None:
    weights = {name: values(name) for name in WEIGHTS}
    weights["blk.0.attn_q.weight"][95, 17] = value
    path = source(tmp_path / "in.gguf", weights)
    with pytest.raises(RequestError, match=message):
        quantize_file(path, tmp_path / "out.gguf", mix)
    assert os.listdir(tmp_path) == ["in.gguf"]


def test_an_existing_target_is_kept_unless_forced(tmp_path: Path) -> None:
    path, target = source(tmp_path / "in.gguf"), tmp_path / "out.gguf"
    target.write_text("precious")
    with pytest.raises(RequestError, match=r"the file exists already \(--force replaces it\)"):
        quantize_file(path, target, "Q8_0")
    assert target.read_text() == "precious"
    quantize_file(path, target, "Q8_0", force=True)
    assert tensors_of(target)["blk.0.attn_q.weight"][0] is F.Q8_0


def test_targets_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = source(tmp_path / "in.gguf")
    with pytest.raises(RequestError, match="cannot be replaced by what is made from it"):
        quantize_file(path, tmp_path / "." / "in.gguf", "Q8_0", force=True)
    with pytest.raises(RequestError, match="its directory does not exist"):
        quantize_file(path, tmp_path / "no" / "out.gguf", "Q8_0")
    with pytest.raises(RequestError, match="this is a directory"):
        quantize_file(path, tmp_path, "Q8_0", force=True)
    with monkeypatch.context() as patch:
        patch.setattr(gguf_writer.shutil, "disk_usage", lambda _: argparse.Namespace(free=1000))
        with pytest.raises(RequestError, match="the disk has 1,000 bytes left"):
            quantize_file(path, tmp_path / "out.gguf", "Q8_0")
    for number, reason in ((errno.ENOSPC, "the disk is full"), (errno.EACCES, "permission is denied")):

        def fail(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(gguf_writer.GGUFStream, "write", fail)
            with pytest.raises(RequestError, match=f"out.gguf: the file cannot be written: {reason}"):
                quantize_file(path, tmp_path / "out.gguf", "Q8_0")
    assert os.listdir(tmp_path) == ["in.gguf"]


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = gguf_writer.GGUFStream.write, iter(range(100))

    def write(stream: gguf_writer.GGUFStream, data: np.ndarray) -> None:
        original(stream, data)
        if next(calls) == 2:
            assert any(name.endswith(".tmp") for name in os.listdir(tmp_path))
            raise KeyboardInterrupt

    monkeypatch.setattr(gguf_writer.GGUFStream, "write", write)
    with pytest.raises(KeyboardInterrupt):
        quantize_file(source(tmp_path / "in.gguf"), tmp_path / "out.gguf", "Q4_K_M")
    assert os.listdir(tmp_path) == ["in.gguf"]


# The command


def command(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    quantize.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def test_the_command_prints_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = source(tmp_path / "in.gguf")
    assert quantize.run(command(path, tmp_path / "out.gguf", "q4_k_m", "--threads", 2)) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "attn_q" in line)
    assert line.split()[:6] == ["blk.0.attn_q.weight", "96", "x", "256", "F32", "Q4_K"]
    error = decoded(quantize_blocks(values("blk.0.attn_q.weight"), F.Q4_K), F.Q4_K) - values("blk.0.attn_q.weight")
    assert f"{np.sqrt(np.mean(np.square(error))):.3g}" in line
    assert "bits per weight" in out.splitlines()[-1]
    with pytest.raises(RequestError, match="--threads is 0"):
        quantize.run(command(path, tmp_path / "out.gguf", "q4_k_m", "--threads", 0))


def test_names_in_the_report_cannot_drive_the_terminal(tmp_path: Path) -> None:
    weights = {"evil\x1b[2J.weight": gaussian(2, 32)}
    report = quantize_file(source(tmp_path / "in.gguf", weights), tmp_path / "out.gguf", "Q8_0")
    stream = io.StringIO()
    report.render(stream)
    assert "\x1b" not in stream.getvalue() and "evil\\x1b[2J.weight" in stream.getvalue()
