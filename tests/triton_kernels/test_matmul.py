"""The products at their edges: tile borders, extreme numbers, several weights at once. Formats: tests/parity."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_weights import golden_blocks, packed
from support import relative_error

from trichord import triton_kernels
from trichord.triton_kernels import launch
from trichord.weight_format import Weight, WeightFormat


def product(x: np.ndarray, weight: Weight, precision: str) -> np.ndarray:
    return triton_kernels.matmul(torch.from_numpy(x), [weight], precision)[0].numpy()


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def float_weight(numbers: np.ndarray, weight_format: WeightFormat = WeightFormat.F32) -> Weight:
    return packed(triton_kernels, numbers.view(np.uint8), weight_format, numbers.shape)


def q8_0_weight(weights: np.ndarray, scale: float) -> Weight:
    """Signed bytes (N, K) with one scale for all blocks."""
    blocks = weights.astype(np.int8).reshape(len(weights), -1, 32).view(np.uint8)
    scales = np.broadcast_to(np.array([scale], np.float16).view(np.uint8), (*blocks.shape[:2], 2))
    return packed(
        triton_kernels, np.concatenate([scales, blocks], -1).reshape(len(weights), -1), WeightFormat.Q8_0, weights.shape
    )


# The interpreter's tiles: 128 rows, 8 or 64 tokens, 1024 columns of integers (128 of floats) or 512 of a GEMM.
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 9, 65])
@pytest.mark.parametrize(("weight_format", "columns"), [(WeightFormat.Q6_K, 1280), (WeightFormat.Q4_0, 1184)])
@pytest.mark.parametrize(
    ("precision", "few", "many"), [("exact", 2e-6, 2e-6), ("default", 1e-4, 1e-3), ("fast", 1.2e-2, 1e-3)]
)
def test_shapes_that_cross_tile_borders(tokens, weight_format, columns, precision, few, many):
    blocks, values = golden_blocks(weight_format, 131, columns)
    x = normal(tokens, columns)
    y = product(x, packed(triton_kernels, blocks, weight_format, values.shape), precision)
    assert y.shape == (tokens, 131)
    bound = few if tokens <= 8 else many
    assert relative_error(y, x.astype(np.float64) @ values.T.astype(np.float64)) < bound


@contextmanager
def launched_as(**changes: object) -> Iterator[None]:
    """Launches by the interpreter's configuration with other tiles of the GEMM."""
    base = launch.launches()
    launch.use(
        replace(
            base,
            **{
                name: {case: replace(tile, **changes) for case, tile in getattr(base, name).items()}
                for name in ("gemm", "exact_gemm")
            },
        )
    )
    try:
        yield
    finally:
        launch.use(None)


# Three programs for 1 to 35 tiles, in groups that may not divide them.
@pytest.mark.parametrize("group", [1, 2, 16])
@pytest.mark.parametrize(("tokens", "rows"), [(9, 1), (9, 131), (70, 3), (145, 200)])
@pytest.mark.parametrize(("precision", "bound"), [("exact", 2e-6), ("default", 1e-3)])
def test_fewer_programs_than_tiles(group, tokens, rows, precision, bound):
    blocks, values = golden_blocks(WeightFormat.Q4_K, rows, 512)
    weight, x = packed(triton_kernels, blocks, WeightFormat.Q4_K, values.shape), normal(tokens, 512)
    with launched_as(rows=32, tokens=32, group=group):
        one_a_tile = product(x, weight, precision)
    with launched_as(rows=32, tokens=32, group=group, programs=3):
        several_a_program = product(x, weight, precision)
    np.testing.assert_array_equal(several_a_program, one_a_tile)
    assert relative_error(one_a_tile, x.astype(np.float64) @ values.T.astype(np.float64)) < bound


@pytest.mark.parametrize("programs", [0, 3])
def test_experts_with_fewer_programs_than_tiles(programs):
    """Experts of no, few and many pairs: empty tiles among full ones."""
    blocks, values = golden_blocks(WeightFormat.Q6_K, 5 * 40, 256)
    weight = packed(triton_kernels, blocks, WeightFormat.Q6_K, (5, 40, 256))
    experts = torch.tensor([[1, 3]] * 50 + [[3, 4]] * 3, dtype=torch.int32)
    x = normal(53, 256)
    with launched_as(rows=16, tokens=16, group=2, programs=programs):
        (y,) = triton_kernels.expert_matmul(torch.from_numpy(x), [weight], experts, "default")
    truth = np.einsum("tk,tenk->ten", x.astype(np.float64), values.reshape(5, 40, 256)[experts.numpy()])
    assert relative_error(y.numpy(), truth) < 1e-3


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("columns", [1, 33, 130, 517])
@pytest.mark.parametrize("weight_format", [WeightFormat.F32, WeightFormat.F16])
@pytest.mark.parametrize("precision", ["exact", "default"])
def test_float_weights_of_any_width(tokens, columns, weight_format, precision):
    numbers = normal(5, columns, seed=1).astype(np.float16 if weight_format is WeightFormat.F16 else np.float32)
    x = normal(tokens, columns)
    y = product(x, float_weight(numbers, weight_format), precision)
    halves = precision == "default" and weight_format is WeightFormat.F16 and tokens > 8
    assert relative_error(y, x.astype(np.float64) @ numbers.T.astype(np.float64)) < (1e-3 if halves else 2e-6)


@pytest.mark.parametrize("tokens", [5, 33])
def test_exact_absolute_error_at_unit_scale(tokens):
    weights = 0.02 * normal(64, 2048, seed=1)
    x = normal(tokens, 2048)
    y = product(x, float_weight(weights), "exact")
    assert np.abs(y - x.astype(np.float64) @ weights.T.astype(np.float64)).max() < 6e-6


@pytest.mark.parametrize("precision", ["exact", "default", "fast"])
@pytest.mark.parametrize("tokens", [2, 9])
def test_extreme_bytes_do_not_overflow(precision, tokens):
    weights = np.full((4, 512), -128)
    weights[1] = 127
    weights[2, ::2] = 127
    x = np.full((tokens, 512), -3.0, np.float32)
    x[0] = 3.0
    y = product(x, q8_0_weight(weights, 0.5), precision)
    np.testing.assert_allclose(y, x.astype(np.float64) @ (0.5 * weights.T), rtol=1e-6)


@pytest.mark.parametrize("tokens", [2, 9])
@pytest.mark.parametrize("magnitude", [1e-28, 1e-8, 1e6, 1e30])
def test_default_precision_holds_at_any_magnitude(tokens, magnitude):
    blocks, values = golden_blocks(WeightFormat.Q4_K, 8, 512)
    x = normal(tokens, 512) * np.float32(magnitude)
    x[1] *= np.float32(1e-4)  # rows are scaled one by one
    y = product(x, packed(triton_kernels, blocks, WeightFormat.Q4_K, values.shape), "default")
    truth = x.astype(np.float64) @ values.T.astype(np.float64)
    assert relative_error(y[0], truth[0]) < 1e-3
    assert relative_error(y[1], truth[1]) < 1e-3


def q4_k_weight(weights: np.ndarray, d: float, dmin: float, minimum: int) -> tuple[Weight, np.ndarray]:
    """Codes (N, K) below 16, each group of 32 with scale 63 * d and minimum `minimum` * dmin -> (weight, values)."""
    heads = np.array([d, dmin], np.float16)
    nibbles = weights.reshape(len(weights), -1, 4, 2, 32).astype(np.uint8)
    codes = (nibbles[..., 0, :] | nibbles[..., 1, :] << 4).reshape(*nibbles.shape[:2], 128)
    fields = np.full((8, 2), 63, np.uint8)
    fields[:, 1] = minimum
    scales = np.concatenate(
        [fields[:4] & 63 | fields[4:] >> 4 << 6, fields[4:, :1] & 15 | (fields[4:, 1:] & 15) << 4], axis=1
    ).T.reshape(-1)
    head = np.broadcast_to(np.concatenate([heads.view(np.uint8), scales]), (*codes.shape[:2], 16))
    blocks = np.concatenate([head, codes], axis=-1).reshape(len(weights), -1)
    values = weights * (63 * float(heads[0])) - minimum * float(heads[1])
    return packed(triton_kernels, blocks, WeightFormat.Q4_K, weights.shape), values


# The smallest d are the smallest float16, the largest give weights near the largest.
@pytest.mark.parametrize(
    ("d", "dmin", "minimum"),
    [(2**-24, 2**-24, 7), (2**-20, 2**-20, 60), (2**-6, 2**-5, 63), (60.0, 120.0, 63), (64.0, 0.0, 0)],
)
def test_scales_at_the_ends_of_the_range(d, dmin, minimum):
    codes = np.random.default_rng(0).integers(0, 16, (5, 512))
    weight, values = q4_k_weight(codes, d, dmin, minimum)
    np.testing.assert_array_equal(triton_kernels.dequantize(weight).numpy(), values.astype(np.float32))
    x = normal(9, 512)
    assert relative_error(product(x, weight, "default"), x.astype(np.float64) @ values.T) < 1e-3


@pytest.mark.parametrize("scale", [2**-24, 2**-20, 3 * 2**-17, 500.0])
def test_scales_of_bytes_at_the_ends_of_the_range(scale):
    codes = np.random.default_rng(0).integers(-128, 128, (5, 512))
    x = normal(9, 512)
    y = product(x, q8_0_weight(codes, scale), "default")
    assert relative_error(y, x.astype(np.float64) @ (np.float16(scale) * codes.T.astype(np.float64))) < 1e-3


@pytest.mark.parametrize("precision", ["exact", "default", "fast"])
@pytest.mark.parametrize("tokens", [3, 9])
def test_zeros_give_zeros(precision, tokens):
    blocks, values = golden_blocks(WeightFormat.Q4_K, 8, 256)
    x = np.zeros((tokens, 256), np.float32)
    assert not product(x, packed(triton_kernels, blocks, WeightFormat.Q4_K, values.shape), precision).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, about the very numbers that this is about
@pytest.mark.parametrize("precision", ["exact", "default", "fast"])
@pytest.mark.parametrize("tokens", [3, 9])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_and_stays_in_its_row(precision, tokens, bad):
    weights = np.random.default_rng(0).integers(-128, 128, (4, 128))
    x = normal(tokens, 128)
    x[1, 40] = bad
    y = product(x, q8_0_weight(weights, 0.5), precision)
    finite = np.isfinite(y).all(axis=1)
    assert not np.isfinite(y[1]).any()
    assert finite.sum() == tokens - 1

    blocks, values = golden_blocks(WeightFormat.Q8_0, 4, 128)
    blocks = blocks.copy()
    blocks[2, 34:36] = np.array([bad], np.float16).view(np.uint8)
    y = product(normal(tokens, 128), packed(triton_kernels, blocks, WeightFormat.Q8_0, values.shape), precision)
    assert not np.isfinite(y[:, 2]).any()
    assert np.isfinite(y[:, [0, 1, 3]]).all()


@pytest.mark.parametrize("precision", ["exact", "default"])
@pytest.mark.parametrize("tokens", [2, 9])
def test_weights_of_several_formats_share_the_activations(precision, tokens):
    weights = []
    for rows, weight_format in [(5, WeightFormat.Q4_K), (3, WeightFormat.F16), (7, WeightFormat.Q6_K)]:
        blocks, values = golden_blocks(weight_format, rows, 256)
        weights.append(packed(triton_kernels, blocks, weight_format, values.shape))
    x = normal(tokens, 256)
    for weight, y in zip(weights, triton_kernels.matmul(torch.from_numpy(x), weights, precision), strict=True):
        np.testing.assert_array_equal(y.numpy(), product(x, weight, precision))


def test_no_rows_of_activations():
    (y,) = triton_kernels.matmul(torch.zeros(0, 64), [float_weight(normal(3, 64))], "default")
    assert y.shape == (0, 3)


def test_arguments_that_do_not_fit():
    weight = float_weight(normal(3, 64))
    with pytest.raises(ValueError, match="do not fit a weight"):
        triton_kernels.matmul(torch.zeros(2, 32), [weight], "default")
    with pytest.raises(ValueError, match="contiguous float32"):
        triton_kernels.matmul(torch.zeros(2, 64, dtype=torch.float16), [weight], "default")
    with pytest.raises(ValueError, match="contiguous float32"):
        triton_kernels.matmul(torch.zeros(64, 2).T, [weight], "default")
    unknown = Weight(weight.data, WeightFormat.I8, (3, 64), "planes")
    with pytest.raises(ValueError, match="no kernel multiplies by weights in I8"):
        triton_kernels.matmul(torch.zeros(2, 64), [unknown], "default")
