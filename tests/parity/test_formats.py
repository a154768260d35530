"""Every weight format on both backends: against GGML's own values, and the backends against each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_weights import GOLDEN_COLUMNS, golden, golden_blocks, has_golden, packed
from support import relative_error

from trichord.dispatch import operations
from trichord.weight_format import WeightFormat

BACKENDS = {layout: operations(layout) for layout in ("planes", "blocks")}
FORMATS = [
    weight_format
    for weight_format in WeightFormat
    if has_golden(weight_format, "quantized")
    and any(weight_format in backend.FUSED_FORMATS for backend in BACKENDS.values())
]
SHARED = [f for f in FORMATS if all(f in backend.FUSED_FORMATS for backend in BACKENDS.values())]
EACH = [
    pytest.param(backend, weight_format, id=f"{layout}-{weight_format.name}")
    for layout, backend in BACKENDS.items()
    for weight_format in FORMATS
    if weight_format in backend.FUSED_FORMATS
]
EACH_KIND = [
    pytest.param(*parameters.values, kind, id=f"{parameters.id}-{kind}")
    for parameters in EACH
    for kind in ("quantized", "random")
    if has_golden(parameters.values[1], kind)
]


def ulps(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference in units of the last place of the expected float32 values."""
    return float(np.max(np.abs(actual.astype(np.float64) - expected) / np.spacing(np.abs(expected)), initial=0.0))


@pytest.mark.parametrize(("backend", "weight_format", "kind"), EACH_KIND)
def test_dequantize_gives_the_values_of_ggml(backend, weight_format, kind):
    blocks, values = golden(weight_format, kind)
    weight = packed(backend, blocks, weight_format, values.shape)
    assert ulps(backend.dequantize(weight).numpy(), values) <= 1


@pytest.mark.parametrize(("backend", "weight_format"), EACH)
def test_embedding_gathers_rows(backend, weight_format):
    blocks, values = golden(weight_format, "quantized")
    weight = packed(backend, blocks, weight_format, values.shape)
    ids = torch.tensor([3, 0, 15, 3])
    assert ulps(backend.embedding(ids, weight).numpy(), values[ids.numpy()]) <= 1


@pytest.mark.parametrize(("backend", "weight_format", "kind"), EACH_KIND)
def test_unpack_inverts_pack(backend, weight_format, kind):
    blocks, values = golden(weight_format, kind)
    data = backend.pack(torch.from_numpy(blocks), weight_format, GOLDEN_COLUMNS)
    assert data.dtype == torch.uint8
    assert data.numel() <= 1.05 * blocks.size
    unpacked = backend.unpack(data, weight_format, len(values), GOLDEN_COLUMNS)
    np.testing.assert_array_equal(unpacked.numpy(), blocks)


# The bounds of "default" are for 16-bit integers with few rows and for float16 operands with many.
@pytest.mark.parametrize(
    ("precision", "tokens", "bound"), [("exact", 3, 2e-6), ("default", 3, 1e-4), ("default", 17, 1e-3)]
)
@pytest.mark.parametrize(("backend", "weight_format"), EACH)
def test_matmul_is_the_float64_product(backend, weight_format, precision, tokens, bound):
    blocks, values = golden_blocks(weight_format, 13, 768)
    weight = packed(backend, blocks, weight_format, values.shape)
    x = np.random.default_rng(1).standard_normal((tokens, 768)).astype(np.float32)
    (y,) = backend.matmul(torch.from_numpy(x), [weight], precision)
    assert y.dtype == torch.float32
    assert relative_error(y.numpy(), x.astype(np.float64) @ values.T.astype(np.float64)) < bound


@pytest.mark.parametrize("weight_format", SHARED, ids=lambda weight_format: weight_format.name)
def test_backends_agree(weight_format):
    blocks, values = golden_blocks(weight_format, 9, 512, seed=2)
    x = torch.from_numpy(np.random.default_rng(3).standard_normal((2, 512)).astype(np.float32))
    products = [
        backend.matmul(x, [packed(backend, blocks, weight_format, values.shape)], "exact")[0].numpy()
        for backend in BACKENDS.values()
    ]
    assert relative_error(*products) < 2e-6
