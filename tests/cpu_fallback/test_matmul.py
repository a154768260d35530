"""Products with packed weights against a float64 product of ggml's values, on every level of the fallback.

Run as a script, this file checks a few formats on the level that its environment forces; the tests start it so.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import parity, relative_error

from trichord import cpu_fallback
from trichord.cpu_fallback.dequantize import dequantize_rows
from trichord.quantize import quantize_blocks
from trichord.weight_format import Weight, WeightFormat

FORMATS = np.load(parity("formats.npz"))
FUSED = sorted((format.name for format in cpu_fallback.FUSED_FORMATS if f"{format.name}.blocks" in FORMATS), key=str)
FLOATS = ("F32", "F16", "BF16", "F64")
ERROR = {"exact": 2e-6, "default": 6e-5, "fast": 1.5e-2}
KINDS = ["F16", "Q4_K", "Q6_K", "Q5_1", "IQ4_XS", "IQ2_XS"]  # of each kind of decoder one


def make_weight(blocks, name):
    format = WeightFormat[name]
    columns = blocks.shape[1] // format.block_bytes * format.block_size
    return Weight(torch.from_numpy(blocks), format, (len(blocks), columns), "blocks")


def stored(name, random=False):
    kind = "random_" if random and f"{name}.random_blocks" in FORMATS else ""
    return FORMATS[f"{name}.{kind}blocks"], FORMATS[f"{name}.{kind}values"]


def activations(rows, columns, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32))


def product(x, values):
    return x.numpy().astype(np.float64) @ values.T.astype(np.float64)


def check(name, precision, rows, blocks, values):
    x = activations(rows, values.shape[1])
    (y,) = cpu_fallback.matmul(x, [make_weight(blocks, name)], precision)
    assert y.shape == (rows, len(blocks)) and y.dtype == torch.float32
    assert relative_error(y, product(x, values)) < ERROR["exact" if name in FLOATS else precision]


@pytest.mark.parametrize("precision", ERROR)
@pytest.mark.parametrize("name", FUSED)
def test_rows_of_activations(name, precision):
    for random in (False, True)[: 1 if name == "MXFP4" else 2]:  # random MXFP4 has weights that sums overflow with
        for rows in (1, 3, 8, 17, 64, 65) if name in KINDS else (1, 8, 65):
            check(name, precision, rows, *stored(name, random))


@pytest.mark.parametrize("precision", ERROR)
@pytest.mark.parametrize("name", FUSED)
def test_odd_shapes(name, precision):
    blocks, values = stored(name)
    block = WeightFormat[name].block_size
    for out, columns in ((1, 512), (5, max(block, 32)), (7, max(block, 32) * 3)):
        part = np.ascontiguousarray(blocks[:out, : WeightFormat[name].row_bytes(min(columns, 512))])
        expected_values = values[:out, : min(columns, 512)]
        for rows in (1, 4):
            x = activations(rows, expected_values.shape[1])
            (y,) = cpu_fallback.matmul(x, [make_weight(part, name)], precision)
            # A single result may be near zero: hold it against the lengths of what was multiplied.
            size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(expected_values, axis=1)
            bound = ERROR["exact" if name in FLOATS else precision]
            assert np.all(abs(y.numpy() - product(x, expected_values)) <= bound * size)


@pytest.mark.parametrize("columns", [1, 31, 33, 255, 257, 300])
@pytest.mark.parametrize("name", FLOATS)
def test_float_rows_of_any_length_stay_inside(name, columns):
    size = WeightFormat[name].row_bytes(columns)
    values = np.random.default_rng(1).standard_normal((3, columns)).astype(np.float32)
    blocks = values.astype(np.float64).view(np.uint8) if name == "F64" else quantize_blocks(values, WeightFormat[name])
    memory = np.full(3 * size + 4096, 0xFF, np.uint8)  # NaN, should anything past the last row be read
    memory[: 3 * size] = blocks.reshape(-1)
    rows = memory[: 3 * size].reshape(3, size)
    for tokens in (1, 3, 70):
        check(name, "default", tokens, rows, dequantize_rows(blocks, WeightFormat[name]))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1", "NVFP4", "Q2_K", "Q6_K", "IQ3_S"])  # of one, two and many scales
def test_tiles_of_any_shape(name):
    """Rows that no tile, no panel and no turn of tokens divides, and columns that no stretch does."""
    format = WeightFormat[name]
    rng = np.random.default_rng(5)
    for out, blocks, tokens in ((1, 1, 9), (37, 3, 16), (8, 9, 33), (70, 2, 530), (3, 11, 1040)):
        values = rng.normal(0, 0.02, (out, blocks * format.block_size)).astype(np.float32)
        packed = quantize_blocks(values, format)
        x = activations(tokens, values.shape[1], seed=tokens)
        expected = product(x, dequantize_rows(packed, format))
        for precision in ERROR:
            (y,) = cpu_fallback.matmul(x, [make_weight(packed, name)], precision)
            assert relative_error(y, expected) < ERROR[precision]
            assert relative_error(y[-1], expected[-1]) < 3 * ERROR[precision]


def test_a_weight_may_lie_at_any_address_and_stride():
    blocks, values = stored("Q4_K")
    memory = np.zeros((16, blocks.shape[1] + 7), np.uint8)
    memory[:, 3:-4] = blocks
    for rows in (1, 70):
        check("Q4_K", "exact", rows, memory[:, 3:-4], values)
    memory = np.zeros(stored("F32")[0].size + 1, np.uint8)[1:].reshape(16, -1)
    memory[:] = stored("F32")[0]
    for rows in (1, 70):
        check("F32", "exact", rows, memory, stored("F32")[1])


@pytest.mark.parametrize("precision", ERROR)
def test_several_weights_share_the_activations(precision):
    names = ["Q4_K", "F16", "Q6_K", "Q4_K"]
    for rows in (1, 6, 40):
        x = activations(rows, 512)
        results = cpu_fallback.matmul(x, [make_weight(stored(name)[0], name) for name in names], precision)
        for name, y in zip(names, results, strict=True):
            assert relative_error(y, product(x, stored(name)[1])) < ERROR[precision]


def test_no_rows():
    (y,) = cpu_fallback.matmul(torch.empty(0, 512), [make_weight(stored("Q4_K")[0], "Q4_K")], "default")
    assert y.shape == (0, 16)


@pytest.mark.parametrize("name", FUSED)
def test_trained_scale_exact(name):
    """Unit-scale activations, 2048 columns, weights of a trained model's size: every single result is within 6e-6."""
    values = np.random.default_rng(2).normal(0, 0.02, (64, 2048)).astype(np.float32)
    blocks = quantize_blocks(values, WeightFormat[name])
    for rows in (1, 4, 64):
        x = activations(rows, 2048, seed=3)
        (y,) = cpu_fallback.matmul(x, [make_weight(blocks, name)], "exact")
        assert abs(y.numpy() - product(x, dequantize_rows(blocks, WeightFormat[name]))).max() < 6e-6


def test_long_rows_default():
    values = np.random.default_rng(4).normal(0, 0.02, (32, 14336)).astype(np.float32)
    blocks = quantize_blocks(values, WeightFormat.Q4_K)
    x = activations(4, 14336)
    expected = product(x, dequantize_rows(blocks, WeightFormat.Q4_K))
    for precision, bound in (("exact", 2e-6), ("default", 3e-5), ("fast", 1e-2)):
        assert relative_error(cpu_fallback.matmul(x, [make_weight(blocks, "Q4_K")], precision)[0], expected) < bound


@pytest.mark.parametrize("precision", ERROR)
@pytest.mark.parametrize("fill", [0x00, 0x7B, 0x80, 0xFB])
@pytest.mark.parametrize("name", [name for name in FUSED if name not in FLOATS])
def test_extreme_quants_do_not_overflow(name, fill, precision):
    """Blocks of one byte throughout hold the largest quants of both signs, under equal and outlying activations."""
    format = WeightFormat[name]
    blocks = np.full((2, format.row_bytes(512)), fill, np.uint8)
    first = {"Q8_K": np.array([1e4], np.float32).view(np.uint8), "MXFP4": [140]}.get(name, [])  # scales of any size
    blocks.reshape(-1, format.block_bytes)[:, : len(first)] = first
    if name == "IQ1_M":
        blocks.reshape(-1, format.block_bytes)[:, 49::2] &= 0x7F  # keeps its scale, in four pieces, a number
    values = dequantize_rows(blocks, format).astype(np.float64)
    if name == "TQ1_0" and fill == 0x80:
        pytest.skip(
            "the zero, subtracted from equal quants, leaves a rest of rounding, with no weight to hold it against"
        )
    x = torch.ones(4, 512)
    x[1] = -1
    x[2, ::2] = -1e4
    x[3, 7::32] = 3e5
    (y,) = cpu_fallback.matmul(x, [make_weight(blocks, name)], precision)
    size = product(abs(x), abs(values))
    step = {"exact": 0, "default": 1 / 32767, "fast": 1 / 127}[precision]  # of the largest of a group
    largest = x.reshape(4, -1, 32).abs().amax(2, keepdim=True).expand(-1, -1, 32).reshape(4, 512)
    assert np.all(abs(y.numpy() - product(x, values)) <= 2e-6 * size + step / 2 * product(largest, abs(values)))


@pytest.mark.parametrize("precision", ERROR)
@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00])
def test_infinite_scales_are_computed_through(bits, rows, precision):
    blocks, values = stored("Q4_K")
    blocks = blocks.copy()
    blocks[5, :2] = np.array([bits], np.uint16).view(np.uint8)
    x = activations(rows, 512)
    y = cpu_fallback.matmul(x, [make_weight(blocks, "Q4_K")], precision)[0].numpy()
    assert not np.isfinite(y[:, 5]).any()
    others = np.arange(16) != 5
    assert relative_error(y[:, others], product(x, values[others])) < ERROR[precision]


@pytest.mark.parametrize("precision", ERROR)
@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_infinite_activations_spoil_their_row_only(number, precision):
    blocks, values = stored("Q6_K")
    x = activations(3, 512)
    x[1, 77] = number
    y = cpu_fallback.matmul(x, [make_weight(blocks, "Q6_K")], precision)[0].numpy()
    assert not np.isfinite(y[1, values[:, 77] != 0]).any()
    assert relative_error(y[::2], product(x[::2], values)) < ERROR[precision]


@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-38, 1e-32])
def test_tiny_activations(tiny):
    x = torch.full((1, 512), tiny)
    for precision in ERROR:
        y = cpu_fallback.matmul(x, [make_weight(stored("Q4_K")[0], "Q4_K")], precision)[0]
        assert torch.isfinite(y).all() and y.abs().max() <= 200 * tiny


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_dequantize_and_embedding_bit_for_bit(name, random):
    blocks, values = stored(name, random)
    weight = make_weight(blocks, name)
    np.testing.assert_array_equal(cpu_fallback.dequantize(weight).numpy(), values)
    ids = torch.tensor([3, 0, 15, 3])
    np.testing.assert_array_equal(cpu_fallback.embedding(ids, weight).numpy(), values[ids])
    assert cpu_fallback.embedding(ids[:0], weight).shape == (0, 512)


def test_dequantizes_experts():
    blocks, values = stored("Q6_K")
    weight = Weight(torch.from_numpy(blocks), WeightFormat.Q6_K, (4, 4, 512), "blocks")
    np.testing.assert_array_equal(cpu_fallback.dequantize(weight).numpy(), values.reshape(4, 4, 512))


@pytest.mark.parametrize("bad", [-1, 16])
def test_embedding_rejects_ids_outside_the_vocabulary(bad):
    with pytest.raises(ValueError, match="token ids"):
        cpu_fallback.embedding(torch.tensor([0, bad]), make_weight(stored("Q4_K")[0], "Q4_K"))


def test_blocks_are_the_layout():
    blocks = torch.from_numpy(stored("Q4_K")[0])
    assert cpu_fallback.LAYOUT == "blocks"
    packed = cpu_fallback.pack(blocks, WeightFormat.Q4_K, 512)
    assert packed.data_ptr() == blocks.data_ptr()
    assert torch.equal(cpu_fallback.unpack(packed, WeightFormat.Q4_K, 16, 512), blocks)


BLOCK_NUMBA = "import sys; sys.modules['numba'] = None; import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"


AVX2 = "+avx,+avx2,+f16c,+fma,+ssse3,+sse4.1,+sse4.2,+bmi,+bmi2,+popcnt"
CPUS = {"no AVX2": ("generic", ""), "no AVX-512": ("haswell", AVX2), "no Numba": None}


@pytest.mark.parametrize("level", CPUS)
def test_other_levels(level):
    if level != "no Numba" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the other tests ran without AVX already")
    if level == "no AVX-512":
        pytest.importorskip("llvmlite")
        import llvmlite.binding as llvm

        if not llvm.get_host_cpu_features().get("avx512bw"):
            pytest.skip("the other tests ran without AVX-512 already")
    generic = dict(zip(("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"), CPUS[level] or (), strict=False))
    command = [sys.executable, *(["-c", BLOCK_NUMBA] if level == "no Numba" else []), __file__]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=os.environ | generic | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.split()
        == {
            "no Numba": ["numpy"],
            "no AVX2": ["numba", "portable"],
            "no AVX-512": ["numba", "avx2"],
        }[level]
    )


if __name__ == "__main__":
    from trichord.cpu_fallback.jit import have_numba

    if have_numba():
        from numba.core.registry import cpu_target

        features = cpu_target.target_context.codegen().magic_tuple()[2]
        print("numba", next((n for n in ("avx512bw", "avx2") if f"+{n}" in features), "portable"))
    else:
        print("numpy")
    for name in FUSED if not have_numba() else KINDS:
        test_dequantize_and_embedding_bit_for_bit(name, True)
        for rows in (1, 70):
            for precision in ERROR:
                check(name, precision, rows, *stored(name))
