"""Planes: alignment, padding and the checks of `pack`; that they hold the right bits is tests/parity's matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_weights import golden_blocks, has_golden, packed

import trichord.triton_kernels.formats.format as format_module
from trichord import triton_kernels
from trichord.triton_kernels.formats import FORMATS
from trichord.triton_kernels.formats.fields import merge, spread
from trichord.weight_format import WeightFormat

EVERY = pytest.mark.parametrize("format", FORMATS.values(), ids=repr)
IN_GOLDEN = [format for format in FORMATS.values() if has_golden(format.weight_format, "quantized")]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_fields_of_one_byte_lie_a_stride_apart(bits):
    codes = torch.randint(0, 1 << bits, (3, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    merged = merge(codes, bits)
    stride = 4 * bits
    assert merged.shape == (3, stride)
    for index in range(32):
        field = merged[:, index % stride] >> (bits * (index // stride))
        assert torch.equal(field & ((1 << bits) - 1), codes[:, index])
    assert torch.equal(spread(merged, bits), codes)


@EVERY
def test_planes_of_odd_row_counts_are_aligned_and_disjoint(format):
    columns = 512
    blocks = torch.zeros((5, format.weight_format.row_bytes(columns)), dtype=torch.uint8)
    data = format.pack(blocks, columns)
    end = 0
    for plane in format.views(data, 5, columns):
        start = plane.data_ptr() - data.data_ptr()
        assert start % 16 == 0
        assert start >= end
        end = start + plane.numel()
    assert end == data.numel()


@pytest.mark.parametrize("format", [format for format in FORMATS.values() if format.codebook], ids=repr)
def test_a_codebook_begins_at_a_multiple_of_its_length(format):
    codebook = format.arguments(torch.zeros(0, dtype=torch.uint8), 0, 256)[-1]
    assert codebook.nbytes & (codebook.nbytes - 1) == 0
    assert codebook.data_ptr() % codebook.nbytes == 0
    assert np.array_equal(codebook.numpy(), format.codebook())


@pytest.mark.parametrize("format", IN_GOLDEN, ids=repr)
def test_packing_a_chunk_at_a_time_changes_nothing(format, monkeypatch):
    blocks, _ = golden_blocks(format.weight_format, 7, 512)
    blocks = torch.from_numpy(blocks)
    whole = format.pack(blocks, 512)
    monkeypatch.setattr(format_module, "_CHUNK_BYTES", 2 * blocks.shape[1])
    assert torch.equal(format.pack(blocks, 512), whole)
    assert torch.equal(format.unpack(whole, 7, 512), blocks)


@pytest.mark.parametrize(
    ("weight_format", "dtype"),
    [
        (WeightFormat.F32, torch.float32),
        (WeightFormat.F16, torch.float16),
        (WeightFormat.BF16, torch.bfloat16),
        (WeightFormat.F64, torch.float64),
    ],
)
@pytest.mark.parametrize("columns", [1, 33, 66])
def test_float_rows_of_any_length(weight_format, dtype, columns):
    numbers = torch.randn((3, columns), generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = packed(triton_kernels, numbers.view(torch.uint8).numpy(), weight_format, (3, columns))
    assert torch.equal(triton_kernels.dequantize(weight), numbers.float())
    blocks = triton_kernels.unpack(weight.data, weight_format, 3, columns)
    assert torch.equal(blocks, numbers.view(torch.uint8))


def test_q8_1_by_hand():
    scale_and_sum = np.array([0.5, -8.0], np.float16)  # the sum of the bytes is -16
    block = np.concatenate([scale_and_sum.view(np.uint8), np.arange(-16, 16, dtype=np.int8).view(np.uint8)])[None]
    weight = packed(triton_kernels, block, WeightFormat.Q8_1, (1, 32))
    np.testing.assert_array_equal(triton_kernels.dequantize(weight).numpy(), np.arange(-16, 16)[None] / 2)
    np.testing.assert_array_equal(triton_kernels.unpack(weight.data, WeightFormat.Q8_1, 1, 32).numpy(), block)


def test_dequantize_keeps_the_shape_of_experts():
    blocks, values = golden_blocks(WeightFormat.Q6_K, 6, 256)
    weight = packed(triton_kernels, blocks, WeightFormat.Q6_K, (2, 3, 256))
    np.testing.assert_array_equal(triton_kernels.dequantize(weight).numpy(), values.reshape(2, 3, 256))


def test_pack_refuses_rows_of_another_length():
    with pytest.raises(ValueError, match="36 bytes are not a row of 96 weights in Q4_0"):
        triton_kernels.pack(torch.zeros((2, 36), dtype=torch.uint8), WeightFormat.Q4_0, 96)
    with pytest.raises(ValueError, match="not a multiple of Q4_K's block of 256"):
        triton_kernels.pack(torch.zeros((2, 144), dtype=torch.uint8), WeightFormat.Q4_K, 128)
