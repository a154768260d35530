"""Products with the experts of each token on both backends, against float64 products of GGML's values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_weights import golden_blocks, has_golden, packed
from support import relative_error

from trichord.dispatch import expert_matmul, operations
from trichord.weight_format import Weight, WeightFormat

BACKENDS = {layout: operations(layout) for layout in ("planes", "blocks")}
EACH = [
    pytest.param(backend, weight_format, id=f"{layout}-{weight_format.name}")
    for layout, backend in BACKENDS.items()
    for weight_format in WeightFormat
    if weight_format in backend.FUSED_FORMATS and has_golden(weight_format, "quantized")
]
# The bounds of "default" are for 16-bit integers with few rows and for float16 operands with many. Those of "fast"
# leave room for products that happen to be small: there are few of them here.
FEW = {"exact": 2e-6, "default": 1e-4, "fast": 3e-2}
MANY = {"exact": 2e-6, "default": 1e-3, "fast": 3e-2}


def of_experts(
    backend, weight_format: WeightFormat, experts: int, rows: int, columns: int
) -> tuple[Weight, np.ndarray]:
    """A weight and its values (X, N, K)."""
    blocks, values = golden_blocks(weight_format, experts * rows, columns, seed=experts)
    shape = experts, rows, columns
    return packed(backend, blocks, weight_format, shape), values.reshape(shape)


def choices(tokens: int, chosen: int, experts: int, seed: int = 0) -> torch.Tensor:
    """Different experts for each token, (T, E) int32; the last expert is nobody's."""
    generator = np.random.default_rng(seed)
    rows = [generator.permutation(experts - 1)[:chosen] for _ in range(tokens)]
    return torch.from_numpy(np.array(rows, np.int32))


def activations(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_normal(shape).astype(np.float32))


def truth(x: torch.Tensor, values: np.ndarray, experts: torch.Tensor) -> np.ndarray:
    rows = np.broadcast_to(x.numpy() if x.ndim == 3 else x.numpy()[:, None], (*experts.shape, x.shape[-1]))
    return np.einsum("tek,tenk->ten", rows.astype(np.float64), values.astype(np.float64)[experts.numpy()])


def check(backend, weight, values, x, experts, precision, bounds):
    (y,) = backend.expert_matmul(x, [weight], experts, precision)
    assert y.shape == (*experts.shape, weight.out_features) and y.dtype == torch.float32
    assert relative_error(y.numpy(), truth(x, values, experts)) < bounds[precision]


@pytest.mark.parametrize(("precision", "tokens"), [("default", 1), ("fast", 1), ("exact", 4), ("default", 4)])
@pytest.mark.parametrize(("backend", "weight_format"), EACH)
def test_every_format(backend, weight_format, precision, tokens):
    weight, values = of_experts(backend, weight_format, 3, 13, 512)
    experts = choices(tokens, 2, 3)
    check(backend, weight, values, activations(tokens, 512), experts, precision, FEW if tokens == 1 else MANY)


@pytest.mark.parametrize("precision", FEW)
@pytest.mark.parametrize("weight_format", [WeightFormat.Q4_K, WeightFormat.F16], ids=["Q4_K", "F16"])
@pytest.mark.parametrize(
    ("tokens", "chosen", "experts", "each"),
    [(1, 3, 4, False), (1, 3, 4, True), (2, 2, 11, False), (5, 4, 6, True), (90, 2, 3, False), (90, 2, 3, True)],
)
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
def test_shapes(backend, tokens, chosen, experts, each, weight_format, precision):
    weight, values = of_experts(backend, weight_format, experts, 37, 512)
    x = activations(tokens, chosen, 512) if each else activations(tokens, 512)
    check(backend, weight, values, x, choices(tokens, chosen, experts), precision, FEW if tokens <= 2 else MANY)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
@pytest.mark.parametrize("columns", [33, 130])
@pytest.mark.parametrize("tokens", [1, 6, 100])
def test_float_experts_of_any_width(backend, columns, tokens):
    numbers = np.random.default_rng(2).standard_normal((3, 5, columns)).astype(np.float32)
    weight = packed(backend, numbers.reshape(15, columns).view(np.uint8), WeightFormat.F32, numbers.shape)
    check(backend, weight, numbers, activations(tokens, columns), choices(tokens, 2, 3), "default", {"default": 2e-6})


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_all_tokens_choose_one_expert(backend, tokens):
    weight, values = of_experts(backend, WeightFormat.Q5_K, 20, 8, 512)
    experts = torch.full((tokens, 1), 19, dtype=torch.int32)
    check(backend, weight, values, activations(tokens, 512), experts, "default", MANY)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
@pytest.mark.parametrize("tokens", [1, 8, 90])
def test_weights_of_several_formats_and_sizes(backend, tokens):
    pairs = [
        of_experts(backend, WeightFormat[name], 5, rows, 256) for name, rows in [("Q4_K", 9), ("F16", 4), ("Q6_K", 9)]
    ]
    x, experts = activations(tokens, 256), choices(tokens, 2, 5)
    products = backend.expert_matmul(x, [weight for weight, _ in pairs], experts, "default")
    for (weight, _), y in zip(pairs, products, strict=True):
        np.testing.assert_array_equal(y.numpy(), backend.expert_matmul(x, [weight], experts, "default")[0].numpy())


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
def test_no_tokens(backend):
    weight, _ = of_experts(backend, WeightFormat.Q4_0, 3, 4, 64)
    (y,) = backend.expert_matmul(torch.zeros(0, 64), [weight], torch.zeros((0, 2), dtype=torch.int32), "default")
    assert y.shape == (0, 2, 4)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
def test_the_scale_of_each_expert_multiplies_its_product(backend):
    weight, values = of_experts(backend, WeightFormat.NVFP4, 4, 8, 128)
    x, experts, scales = activations(3, 128), choices(3, 2, 4), torch.tensor([0.5, 2.0, -3.0, 0.25])
    for scale, factors in ((scales, scales.numpy()[experts.numpy()][..., None]), (0.75, 0.75), (1.0, 1.0)):
        scaled = Weight(weight.data, weight.format, weight.shape, weight.layout, scale)
        (y,) = expert_matmul(x, [scaled], experts, "exact")
        assert relative_error(y.numpy(), truth(x, values, experts) * factors) < 2e-6


def test_an_expert_that_does_not_exist():
    weight, _ = of_experts(BACKENDS["blocks"], WeightFormat.Q4_0, 3, 4, 64)
    for expert in (3, -1):
        with pytest.raises(ValueError, match=r"no expert|negative"):
            BACKENDS["blocks"].expert_matmul(activations(1, 64), [weight], torch.tensor([[expert]]).int(), "default")


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
def test_activations_that_do_not_fit(backend):
    weight, _ = of_experts(backend, WeightFormat.Q4_0, 3, 4, 64)
    for shape in ((2, 32), (3, 64), (2, 1, 64), (2,)):
        with pytest.raises(ValueError, match="do not fit"):
            backend.expert_matmul(activations(*shape), [weight], choices(2, 2, 3), "default")
