"""Loading weights: shards, companions, formats without a kernel. Values are gguf's own dequantization."""

from __future__ import annotations

import warnings

import gguf
import numpy as np
import pytest
import torch
from support import relative_error

from trichord import GGUFFile, WeightFormat, dispatch_matmul, load_weight
from trichord import weights as weights_module
from trichord.dispatch import expert_matmul
from trichord.errors import GGUFError, ModelError, RequestError
from trichord.weights import load_vector

ROWS, COLUMNS = 24, 512


@pytest.fixture(scope="module")
def source():
    return np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)


@pytest.fixture
def file(tmp_path, source):
    writer = gguf.GGUFWriter(tmp_path / "weights.gguf", "llama")
    for name, kind in (("a", "Q8_0"), ("b", "Q4_0"), ("c", "Q5_1"), ("d", "F16")):
        kind = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(source, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.add_tensor("a.scale", np.array([0.25], np.float32))
    writer.add_tensor("b.scale", np.array([0.25, 3.0], np.float32))
    writer.add_tensor("gain", source[0].astype(np.float16))
    writer.add_tensor("experts.weight", np.stack([source, source]))
    writer.add_tensor("experts.scale", np.array([0.5, 2.0], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(tmp_path / "weights.gguf")


def dense(file: GGUFFile, name: str) -> np.ndarray:
    info = file.tensors[name]
    return gguf.quants.dequantize(file.blocks(name), gguf.GGMLQuantizationType(info.format.ggml_id))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("rows", "columns"), [(None, None), (slice(3, 17), None), (None, slice(64, 256))])
def test_a_shard_multiplies_by_its_part(file, device, rows, columns):
    weight = load_weight(file, "d.weight", device, rows=rows, columns=columns)
    part = dense(file, "d.weight")[rows or slice(None), columns or slice(None)].astype(np.float64)
    assert weight.shape == part.shape
    x = np.random.default_rng(1).standard_normal((3, part.shape[1])).astype(np.float32)
    y = dispatch_matmul(torch.from_numpy(x), weight, precision="exact")
    assert relative_error(y.numpy(), x @ part.T) < 2e-6


def test_shards_of_blocks_are_cut_between_blocks(file):
    weight = load_weight(file, "a.weight", columns=slice(64, 128))
    assert weight.data.shape == (ROWS, 2 * 34)
    with pytest.raises(RequestError, match=r"8:128.*blocks of 32"):
        load_weight(file, "a.weight", columns=slice(8, 128))


def test_the_scale_beside_a_weight_multiplies_the_product(file):
    weight = load_weight(file, "a.weight")
    assert weight.scale == 0.25
    x = np.ones((1, COLUMNS), np.float32)
    y = dispatch_matmul(torch.from_numpy(x), weight, precision="exact").numpy()
    assert relative_error(y, 0.25 * dense(file, "a.weight").sum(1)[None]) < 1e-5
    with pytest.raises(GGUFError, match=r"b\.scale"):
        load_weight(file, "b.weight")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_expert_may_have_a_scale(file, source, device):
    weight = load_weight(file, "experts.weight", device)
    assert weight.scale.tolist() == [0.5, 2.0]
    experts = torch.tensor([[1, 0]], dtype=torch.int32)
    (y,) = expert_matmul(torch.ones(1, COLUMNS), [weight], experts, "exact")
    assert relative_error(y.numpy(), np.outer([2.0, 0.5], source.sum(1, dtype=np.float64))[None]) < 2e-6


def test_the_cpu_reads_the_file_in_place(file):
    weight = load_weight(file, "a.weight")
    assert weight.nbytes == file.tensors["a.weight"].nbytes
    assert np.shares_memory(weight.data.numpy(), file.blocks("a.weight"))


def test_a_format_without_a_kernel_is_held_as_float32_with_one_warning(file, monkeypatch):
    from trichord.device import CPU

    monkeypatch.setattr(weights_module, "_WARNED", set())
    monkeypatch.setattr(CPU.operations, "FUSED_FORMATS", CPU.operations.FUSED_FORMATS - {WeightFormat.Q5_1})
    with pytest.warns(UserWarning, match=r"Q5_1.*5\.3 times") as caught:
        weight = load_weight(file, "c.weight")
        load_weight(file, "c.weight")
    assert len(caught) == 1 and weight.format is WeightFormat.F32
    x = np.random.default_rng(2).standard_normal((2, COLUMNS)).astype(np.float32)
    y = dispatch_matmul(torch.from_numpy(x), weight, precision="exact").numpy()
    assert relative_error(y, x @ dense(file, "c.weight").astype(np.float64).T) < 2e-6


def test_vectors_are_float32(file, source):
    assert torch.equal(load_vector(file, "gain"), torch.from_numpy(source[0].astype(np.float16).astype(np.float32)))


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64])
def test_integer_tensors_are_their_numbers(tmp_path, dtype):
    values = np.random.default_rng(3).integers(-100, 100, (5, 12)).astype(dtype)
    writer = gguf.GGUFWriter(tmp_path / "integers.gguf", "llama")
    writer.add_tensor("matrix", values)
    writer.add_tensor("vector", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "integers.gguf")
    assert np.array_equal(load_vector(file, "vector").numpy(), values[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = load_weight(file, "matrix")
    y = dispatch_matmul(torch.eye(12), weight, precision="exact")
    assert np.array_equal(y.numpy(), values.T)


def test_what_is_no_weight_is_refused(file):
    with pytest.raises(GGUFError, match="absent"):
        load_weight(file, "absent")
    with pytest.raises(ModelError, match="gain"):
        load_weight(file, "gain")
    with pytest.raises(RequestError, match="experts"):
        load_weight(file, "experts.weight", rows=slice(0, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dispatch_keeps_the_dtype_and_leading_dimensions(file, dtype):
    weight = load_weight(file, "d.weight")
    y = dispatch_matmul(torch.ones(2, 3, COLUMNS, dtype=dtype), weight)
    assert y.dtype == dtype and y.shape == (2, 3, ROWS)
    assert dispatch_matmul(torch.ones(COLUMNS, dtype=dtype), weight).shape == (ROWS,)
    assert dispatch_matmul(torch.ones(0, COLUMNS, dtype=dtype), weight).shape == (0, ROWS)


def test_dispatch_refuses_what_does_not_fit(file):
    weight = load_weight(file, "d.weight")
    with pytest.raises(RequestError, match="512"):
        dispatch_matmul(torch.ones(3, 100), weight)
    with pytest.raises(RequestError, match="int64"):
        dispatch_matmul(torch.ones(3, COLUMNS, dtype=torch.int64), weight)
    with pytest.raises(RequestError, match="precise"):
        dispatch_matmul(torch.ones(3, COLUMNS), weight, precision="precise")
    with pytest.raises(RequestError, match="shape"):
        dispatch_matmul(torch.ones(3, COLUMNS), load_weight(file, "experts.weight"))
