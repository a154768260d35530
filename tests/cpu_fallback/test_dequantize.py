"""NumPy dequantization against ggml's own values and, where it knows the type, gguf's."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from support import parity

from trichord.cpu_fallback.decode import DECODERS, chunk
from trichord.cpu_fallback.dequantize import dequantize_rows
from trichord.weight_format import WeightFormat

FORMATS = np.load(parity("formats.npz"))
STORED = [name.split(".")[0] for name in FORMATS.files if name.endswith(".blocks")]


@pytest.mark.parametrize("kind", ["", "random_"])
@pytest.mark.parametrize("name", STORED)
def test_reproduces_ggml_bit_for_bit(name, kind):
    if f"{name}.{kind}blocks" not in FORMATS:
        pytest.skip(f"no random blocks of {name}")
    values = dequantize_rows(FORMATS[f"{name}.{kind}blocks"], WeightFormat[name])
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, FORMATS[f"{name}.{kind}values"])


@pytest.mark.parametrize(
    ("name", "dtype"), [("F64", "f8"), ("I8", "i1"), ("I16", "i2"), ("I32", "i4"), ("I64", "i8"), ("F32", "f4")]
)
@pytest.mark.parametrize("columns", [1, 31, 77])
def test_plain_numbers(name, dtype, columns):
    numbers = np.random.default_rng(0).integers(-100, 100, (3, columns)).astype("<" + dtype)
    np.testing.assert_array_equal(dequantize_rows(numbers.view(np.uint8), WeightFormat[name]), numbers)


@pytest.mark.parametrize("columns", [1, 31, 32, 77])
@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_halves_of_any_row_length(name, columns):
    numbers = np.random.default_rng(1).standard_normal((3, columns)).astype(np.float32)
    packed = quants.quantize(numbers, GGMLQuantizationType[name]).view(np.uint8)
    expected = quants.dequantize(packed, GGMLQuantizationType[name])
    np.testing.assert_array_equal(dequantize_rows(packed, WeightFormat[name]), expected.reshape(3, columns))


def test_q8_1_by_hand():
    block = np.zeros((1, 36), np.uint8)
    block[0, :2] = np.array([0.5], np.float16).view(np.uint8)
    block[0, 2:4] = 77  # the stored sum does not matter
    block[0, 4:] = np.arange(-16, 16, dtype=np.int8).view(np.uint8)
    np.testing.assert_array_equal(dequantize_rows(block, WeightFormat.Q8_1)[0], np.arange(-16, 16) / 2)


def test_many_rows_go_by_tiles():
    rows = np.tile(FORMATS["Q4_K.blocks"], (400, 1))
    expected = np.tile(FORMATS["Q4_K.values"], (400, 1))
    np.testing.assert_array_equal(dequantize_rows(rows, WeightFormat.Q4_K), expected)


def test_rejects_a_part_of_a_block():
    with pytest.raises(ValueError, match="Q4_K"):
        dequantize_rows(np.zeros((2, 145), np.uint8), WeightFormat.Q4_K)


@pytest.mark.parametrize("format", DECODERS, ids=lambda format: format.name)
def test_decoders_cover_whole_groups(format):
    weights, size = chunk(format)
    assert weights % 32 == 0 and size == format.row_bytes(weights)
