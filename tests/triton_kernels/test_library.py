"""Products through the GPU's library, which in the interpreter is torch's on the CPU: against float64 products."""

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
from trichord.triton_kernels import launch, library
from trichord.triton_kernels.formats import FORMATS
from trichord.weight_format import Weight, WeightFormat


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def quantized(name: str, rows: int, columns: int) -> tuple[Weight, np.ndarray]:
    blocks, values = golden_blocks(WeightFormat[name], rows, columns)
    return packed(triton_kernels, blocks, WeightFormat[name], values.shape), values.astype(np.float64)


@contextmanager
def used_from(tokens: int | None, rows_at_a_time: int = 1 << 20, columns: int = 512) -> Iterator[None]:
    """The library multiplies from so many rows of x on, by so many rows of the weight at a time."""
    launch.use(replace(launch.launches(), library_tokens=tokens, library_bytes=2 * columns * rows_at_a_time))
    try:
        yield
    finally:
        launch.use(None)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, int]]:
    """The shapes of the pieces that were multiplied."""
    shapes, multiply = [], library._multiply

    def counted(x, weights, y):
        shapes.append(tuple(weights.shape))
        multiply(x, weights, y)

    monkeypatch.setattr(library, "_multiply", counted)
    return shapes


def product(x: np.ndarray, weight: Weight, precision: str = "default", bias: np.ndarray | None = None) -> np.ndarray:
    biases = None if bias is None else [torch.from_numpy(bias)]
    return triton_kernels.matmul(torch.from_numpy(x), [weight], precision, biases)[0].numpy()


@pytest.mark.parametrize("weight_format", sorted(FORMATS, key=lambda each: each.ggml_id), ids=lambda each: each.name)
def test_every_format_has_the_operands_of_the_fused_product(weight_format, calls):
    columns = max(weight_format.block_size, 256)
    try:
        weight, values = quantized(weight_format.name, 21, columns)
    except KeyError:
        pytest.skip("no golden data")
    x = normal(17, columns)
    with used_from(None):
        fused = product(x, weight)
    assert not calls
    with used_from(17, rows_at_a_time=8, columns=columns):
        by_library = product(x, weight)
    assert calls == ([] if FORMATS[weight_format].wide else [(8, columns), (8, columns), (5, columns)])
    assert relative_error(by_library, fused) < 2e-6  # the same operands in another order
    assert relative_error(by_library, x.astype(np.float64) @ values.T) < 1e-3


@pytest.mark.parametrize(("rows", "at_a_time"), [(1, 1), (1, 100), (131, 1), (131, 50), (131, 131), (200, 0)])
@pytest.mark.parametrize("columns", [256, 512, 1280])
def test_pieces_of_any_size(rows, at_a_time, columns, calls):
    weight, values = quantized("Q4_K", rows, columns)
    x = normal(33, columns)
    with used_from(9, at_a_time, columns):
        y = product(x, weight)
    assert max(calls)[0] == min(rows, max(1, at_a_time)) and sum(count for count, _ in calls) == rows
    assert relative_error(y, x.astype(np.float64) @ values.T) < 1e-3


@pytest.mark.parametrize("columns", [1, 33, 130, 517])
def test_float_weights_of_any_width(columns, calls):
    numbers = normal(5, columns, seed=1).astype(np.float16)
    weight, x = packed(triton_kernels, numbers.view(np.uint8), WeightFormat.F16, numbers.shape), normal(9, columns)
    with used_from(9, 3, -(-columns // 16) * 16):
        y = product(x, weight)
    assert len(calls) == 2
    assert relative_error(y, x.astype(np.float64) @ numbers.T.astype(np.float64)) < 1e-3


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("magnitude", [1e-28, 1.0, 1e30])
def test_scales_biases_and_magnitudes(biased, magnitude, calls):
    """Rows of x are scaled one by one, so that the largest do not overflow nor the smallest vanish."""
    weight, values = quantized("Q6_K", 37, 512)
    x = normal(12, 512) * np.float32(magnitude)
    x[1] *= np.float32(1e-4)
    bias = normal(37) * np.float32(magnitude) if biased else None
    with used_from(12, 16):
        y = product(x, replace(weight, scale=-0.75), bias=bias)
    assert len(calls) == 3
    truth = -0.75 * (x.astype(np.float64) @ values.T) + (bias if biased else 0.0)
    assert relative_error(y[0], truth[0]) < 1e-3
    assert relative_error(y[1], truth[1]) < 1e-3


def test_it_is_for_many_rows_in_float16_alone(calls):
    q4, q4_values = quantized("Q4_K", 20, 512)
    x = normal(20, 512)
    with used_from(20):
        assert relative_error(product(x, q4, "exact"), x.astype(np.float64) @ q4_values.T) < 2e-6
        product(x[:19], q4)
        stacked = packed(triton_kernels, golden_blocks(WeightFormat.Q4_K, 6, 512)[0], WeightFormat.Q4_K, (2, 3, 512))
        experts = torch.zeros((20, 2), dtype=torch.int32)
        triton_kernels.expert_matmul(torch.from_numpy(x), [stacked], experts, "default")
        assert not calls
        product(x, q4, "fast")
    assert len(calls) == 1
