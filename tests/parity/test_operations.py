"""Norms, rotary embedding and activations: both backends against float64 NumPy and against each other."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from golden_weights import golden_blocks, packed
from support import eight_bits, relative_error

from trichord.dispatch import Operations, operations
from trichord.weight_format import WeightFormat


@dataclass(frozen=True)
class Backend:
    """A backend's operations and where its tensors live."""

    operations: Operations
    device: str


TRITON = Backend(operations("planes"), "cuda" if torch.cuda.is_available() else "cpu")
CPU = Backend(operations("blocks"), "cpu")
both = pytest.mark.parametrize("backend", [pytest.param(TRITON, id="triton"), pytest.param(CPU, id="cpu")])


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def on(backend: Backend, array: np.ndarray) -> torch.Tensor:
    """A copy on the backend's device."""
    return torch.from_numpy(array.copy()).to(backend.device)


# Norm


def norm_oracle(x: np.ndarray, gain: np.ndarray | float, epsilon: float, centered: bool = False) -> np.ndarray:
    x = x.astype(np.float64)
    if centered:
        x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * gain


@both
@pytest.mark.parametrize("tokens, width", [(1, 64), (3, 100), (2, 2048), (1, 16384 + 72), (9, 7)])
@pytest.mark.parametrize("added", [False, True])
def test_norm(backend, tokens, width, added):
    residual, delta = 30 * normal(tokens, width), normal(tokens, width, seed=1)
    gain = normal(width, seed=2)
    expected_residual = residual + delta if added else residual
    x = on(backend, residual)
    y = backend.operations.norm(x, on(backend, gain), 1e-5, on(backend, delta) if added else None)
    assert y.shape == (tokens, width) and y.dtype == torch.float32
    np.testing.assert_array_equal(x.cpu(), expected_residual)
    assert relative_error(y.cpu(), norm_oracle(expected_residual, gain, 1e-5)) < 1e-6


@both
def test_norm_adds_epsilon_inside_the_root(backend):
    x = np.array([[3e-3, 4e-3]], np.float32)
    y = backend.operations.norm(on(backend, x), on(backend, np.ones(2, np.float32)), 1e-5)
    np.testing.assert_allclose(y.cpu(), x / np.sqrt(12.5e-6 + 1e-5), rtol=1e-6)


@both
def test_norm_takes_a_delta_whose_rows_are_strided(backend):
    wide = on(backend, normal(3, 80, seed=1))
    x = on(backend, normal(3, 40))
    y = backend.operations.norm(x.clone(), on(backend, np.ones(40, np.float32)), 1e-5, wide[:, 40:])
    expected = norm_oracle((x + wide[:, 40:]).cpu().numpy(), np.ones(40), 1e-5)
    assert relative_error(y.cpu(), expected) < 1e-6


@both
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("with_gain, with_bias", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("tokens, width", [(3, 100), (1, 16384 + 72)])
def test_norm_with_bias_and_without_gain(backend, centered, with_gain, with_bias, tokens, width):
    x, delta = 5 + normal(tokens, width), normal(tokens, width, seed=1)
    gain, bias = normal(width, seed=2), normal(width, seed=3)
    given_gain, given_bias = on(backend, gain) if with_gain else None, on(backend, bias) if with_bias else None
    residual = on(backend, x)
    y = backend.operations.norm(residual, given_gain, 1e-5, on(backend, delta), bias=given_bias, centered=centered)
    expected = norm_oracle(x + delta, gain if with_gain else 1.0, 1e-5, centered) + (bias if with_bias else 0.0)
    np.testing.assert_array_equal(residual.cpu(), x + delta)
    np.testing.assert_allclose(y.cpu(), expected, rtol=2e-6, atol=5e-6)


@both
def test_layer_norm_of_rows_far_from_zero(backend):
    """The mean of the squares less the square of the mean would leave nothing of the variance."""
    x = (10_000 + np.arange(-8, 8)).astype(np.float32)[None]
    y = backend.operations.norm(on(backend, x), None, 1e-9, centered=True)
    np.testing.assert_allclose(y.cpu(), (np.arange(-8, 8) + 0.5)[None] / np.sqrt(255 / 12), rtol=1e-6)


@both
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("lines", [1, 5, 2])
def test_norm_of_heads(backend, centered, lines):
    """Heads of a slice of a fused product, which cannot be seen as one matrix; lines of the gain come by turns."""
    tokens, heads, size = 7, 5, 24
    fused, delta = normal(tokens, 3 + heads, 2 * size), normal(heads, tokens, size, seed=1)
    gain, bias = normal(lines, size, seed=2), normal(lines, size, seed=3)
    product = on(backend, fused)
    added = on(backend, delta).transpose(0, 1)
    y = backend.operations.norm(
        product[:, 3:, :size], on(backend, gain), 1e-6, added, bias=on(backend, bias), centered=centered
    )
    x = fused[:, 3:, :size] + delta.swapaxes(0, 1)
    line = np.arange(tokens * heads).reshape(tokens, heads) % lines
    assert y.shape == (tokens, heads, size) and y.is_contiguous()
    np.testing.assert_allclose(y.cpu(), norm_oracle(x, gain[line], 1e-6, centered) + bias[line], rtol=2e-6, atol=2e-6)
    fused[:, 3:, :size] = x
    np.testing.assert_array_equal(product.cpu(), fused)


@both
def test_norm_leaves_a_residual_without_delta_alone(backend):
    x = on(backend, normal(2, 3, 16))
    rows = x.view(6, 16)
    gain = on(backend, normal(3, 16, seed=1))
    before = x.clone()
    assert torch.equal(backend.operations.norm(x, gain, 1e-6).view(6, 16), backend.operations.norm(rows, gain, 1e-6))
    assert torch.equal(x, before)


# Activation


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


ACTIVATIONS = {
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: x * sigmoid(np.sqrt(8 / np.pi) * (x + 0.044715 * x**3)),  # x (1 + tanh(z)) / 2 = x sigmoid(2 z)
    "gelu_erf": lambda x: x * np.vectorize(math.erfc)(x / -np.sqrt(2)) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
    "swiglu_oai": lambda x: np.minimum(x, 7) * sigmoid(1.702 * np.minimum(x, 7)),
}
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
overflows = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's, under Triton's interpreter


@both
@overflows
@activations
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens, width", [(1, 1), (2, 1000), (3, 1025)])
def test_activation(backend, activation, gated, tokens, width):
    """Gate and up are halves of one product."""
    fused = 8 * normal(tokens, 2 * width)
    fused[0, 0] = -200.0  # exp(200) overflows: the answer is 0, not NaN
    product = on(backend, fused)
    y = backend.operations.activate(product[:, :width], product[:, width:] if gated else None, activation)
    gate, up = np.split(fused.astype(np.float64), 2, axis=1)
    if activation == "swiglu_oai":
        up = np.clip(up, -7, 7) + 1
    assert y.shape == (tokens, width) and y.is_contiguous()
    expected = ACTIVATIONS[activation](gate) * (up if gated else 1.0)
    tolerance = 1e-5 if activation == "swiglu_oai" else 2e-6  # what rounding 1.702 x makes of the tail
    np.testing.assert_allclose(y.cpu(), expected, rtol=tolerance, atol=1e-30)
    np.testing.assert_array_equal(product.cpu(), fused)


@both
@pytest.mark.parametrize("activation", ["gelu", "gelu_erf"])
def test_gelu_is_accurate_to_the_ends_of_its_tail(backend, activation):
    """Down to the smallest float32 numbers; beyond these it is 0 on the left and x on the right."""
    small = np.geomspace(1e-20, 1, 2000)
    x = np.concatenate([np.linspace(-14, 14, 40_001), small, -small, [-1e30, -1e4, 0, 1e4, 1e30]]).astype(np.float32)
    y = backend.operations.activate(on(backend, x), None, activation).cpu().numpy()
    with np.errstate(over="ignore"):
        expected = ACTIVATIONS[activation](x.astype(np.float64))
    normal_numbers = np.abs(expected) > 1e-36
    np.testing.assert_allclose(y[normal_numbers], expected[normal_numbers], rtol=1e-6)
    np.testing.assert_allclose(y[~normal_numbers], expected[~normal_numbers], atol=1e-36)


@both
@overflows
def test_activation_of_each_experts_slice(backend):
    product = normal(3, 2, 80)
    halves = on(backend, product).split(40, dim=2)
    y = backend.operations.activate(*halves, "silu")
    gate, up = np.split(product.astype(np.float64), 2, axis=2)
    assert y.is_contiguous()
    np.testing.assert_allclose(y.cpu(), ACTIVATIONS["silu"](gate) * up, rtol=2e-6, atol=1e-30)


@both
@overflows
@activations
@pytest.mark.parametrize("formats", ["Q4_K Q6_K", "Q8_0 Q8_0", "Q5_K"])
@pytest.mark.parametrize("tokens, precision", [(1, "default"), (5, "default"), (3, "exact"), (11, "default")])
def test_activation_of_products(backend, activation, formats, tokens, precision):
    x, biases = normal(tokens, 512), [normal(96, seed=1), None]
    weights, products = [], []
    for name, bias in zip(formats.split(), biases, strict=False):
        blocks, values = golden_blocks(WeightFormat[name], 96, 512)
        weight = packed(backend.operations, blocks, WeightFormat[name], values.shape)
        weights.append(replace(weight, data=weight.data.to(backend.device), scale=0.05))
        products.append(0.05 * (x.astype(np.float64) @ values.T.astype(np.float64)) + (0.0 if bias is None else bias))
    given = [None if bias is None else on(backend, bias) for bias in biases[: len(weights)]]
    y = backend.operations.activated_matmul(on(backend, x), weights, precision, activation, given)
    gate, *up = products
    if up and activation == "swiglu_oai":
        up = [np.clip(up[0], -7, 7) + 1]
    expected = ACTIVATIONS[activation](gate) * (up[0] if up else 1.0)
    y = y if isinstance(y, torch.Tensor) else y.x
    assert relative_error(y.cpu(), expected) < (4e-6 if precision == "exact" else 1e-3)


@both
def test_the_activation_of_gpt_oss_by_hand(backend):
    """gate is cut at 7 from above only, up at 7 both ways; 1 is added to up."""
    gate, up = (on(backend, np.array([row], np.float32)) for row in ([0.0, 9.0, -9.0, 1.0], [5.0, 9.0, -9.0, -1.0]))
    y = backend.operations.activate(gate, up, "swiglu_oai")
    expected = [0, 7 / (1 + math.exp(-1.702 * 7)) * 8, -9 / (1 + math.exp(1.702 * 9)) * -6, 0]
    np.testing.assert_allclose(y.cpu()[0], expected, rtol=1e-6)


# Rotary embedding and the cache


@both
@pytest.mark.parametrize("interleaved, pairs", [(True, [(0, 1), (2, 3)]), (False, [(0, 2), (1, 3)])])
def test_rotary_by_hand(backend, interleaved, pairs):
    """A quarter turn and a half turn of (1, 2, 3, 4, 5), of which the first four elements rotate."""
    cos, sin = on(backend, np.array([[0.0, -1.0]], np.float32)), on(backend, np.array([[1.0, 0.0]], np.float32))
    head = np.array([[[1.0, 2.0, 3.0, 4.0, 5.0]]], np.float32)
    expected = head[0, 0].copy()
    (a, b), (c, d) = pairs
    expected[[a, b]] = -head[0, 0, b], head[0, 0, a]
    expected[[c, d]] = -head[0, 0, c], -head[0, 0, d]
    q, k, v = (on(backend, head) for _ in range(3))
    keys, values = (torch.zeros(2, 1, 16, 5, device=backend.device) for _ in range(2))
    slots = torch.tensor([16 + 3], device=backend.device)
    backend.operations.rotary_and_cache(q, k, v, cos, sin, keys, values, slots, interleaved)
    np.testing.assert_allclose(q.cpu()[0, 0], expected, atol=1e-6)
    np.testing.assert_allclose(keys.cpu()[1, 0, 3], expected, atol=1e-6)
    np.testing.assert_array_equal(values.cpu()[1, 0, 3], head[0, 0])
    assert keys.count_nonzero() == values.count_nonzero() == 5


@both
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize(
    "heads, kv_heads, size, value_size, rotated, page",
    [(9, 3, 40, 24, 40, 16), (8, 8, 80, 80, 32, 64), (1, 1, 6, 8, 2, 16), (3, 3, 20, 20, 0, 16), (9, 1, 24, 0, 8, 16)],
)
def test_rotary_and_cache(backend, interleaved, dtype, heads, kv_heads, size, value_size, rotated, page):
    """The q, k and v of one product; no v where its size is 0. A cache of 8 bits holds them as `eight_bits` does."""
    tokens, pages = 5, 4
    widths = np.cumsum([0, heads * size, kv_heads * size, kv_heads * value_size])
    fused = normal(tokens, widths[-1])
    angles = 7 * normal(tokens, rotated // 2)
    slots = np.random.default_rng(1).permutation(pages * page)[:tokens]
    product = on(backend, fused)
    q, k, v = (
        product[:, a:b].unflatten(1, (count, -1))
        for (a, b), count in zip(itertools.pairwise(widths), (heads, kv_heads, kv_heads), strict=True)
    )
    keys = torch.full((pages, kv_heads, page, size), -77.0, dtype=dtype, device=backend.device)
    values = torch.full((pages, kv_heads, page, value_size), -77.0, dtype=dtype, device=backend.device)
    cos, sin = on(backend, np.cos(angles)), on(backend, np.sin(angles))
    scales = [
        torch.full((pages, kv_heads, page, -(-width // 32)), 0.5, dtype=torch.float16, device=backend.device)
        for width in (size, value_size)
    ]
    key_scales, value_scales = scales if dtype == torch.int8 else (None, None)
    v_and_cache = (v, values) if value_size else (None, None)
    backend.operations.rotary_and_cache(
        *(q, k, v_and_cache[0], cos, sin, keys, v_and_cache[1], on(backend, slots), interleaved),
        key_scales=key_scales,
        value_scales=value_scales,
    )

    def turned(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        left = slice(0, rotated, 2) if interleaved else slice(0, rotated // 2)
        right = slice(1, rotated, 2) if interleaved else slice(rotated // 2, rotated)
        z = (x[..., left] + 1j * x[..., right]) * np.exp(1j * angles.astype(np.float64))[:, None]
        x[..., left], x[..., right] = z.real, z.imag
        return x

    head_q, head_k, head_v = (
        part.reshape(tokens, count, -1)
        for part, count in zip(np.split(fused, widths[1:-1], axis=1), (heads, kv_heads, kv_heads), strict=True)
    )
    np.testing.assert_allclose(q.cpu(), turned(head_q), atol=2e-6)
    written = slots // page, slice(None), slots % page
    for cache, scale, rows in ((keys, scales[0], turned(head_k)), (values, scales[1], head_v)):
        untouched = np.ones(cache.shape, bool)
        untouched[written] = False
        assert (cache.cpu().numpy()[untouched] == -77).all()
        actual = cache.cpu().numpy()[written]
        if dtype == torch.int8 and rows.size:
            numbers, expected_scales = eight_bits(rows)
            np.testing.assert_allclose(scale.cpu().numpy()[written], expected_scales, rtol=1e-3)
            assert abs(actual.astype(np.int64) - numbers).max() <= 1
            assert (actual != numbers).mean() < 0.02
        else:
            np.testing.assert_allclose(actual, rows, atol=2e-6 if dtype == torch.float32 else 2e-3)
    np.testing.assert_array_equal(v.cpu(), head_v)


# Backend against backend


def test_backends_agree_on_a_layer():
    """Norm, rotary embedding, cache write, attention and activation of a mixed batch, one after the other."""
    page, heads, kv_heads, size = 16, 6, 2, 64  # a sequence with 1 new token of 21, and one of 18
    tokens, widths = 19, [heads * size, kv_heads * size, kv_heads * size]
    x, delta, gain = normal(tokens, sum(widths)), normal(tokens, sum(widths), seed=1), normal(sum(widths), seed=2)
    angles, history = normal(tokens, size // 2, seed=3), normal(5, kv_heads, page, size, seed=4)
    tables = np.array([[3, 0], [4, 1]], np.int32)
    slots = np.array([0 * page + 4, *range(4 * page, 5 * page), 1 * page, 1 * page + 1])

    def layer(backend: Backend) -> list[torch.Tensor]:
        residual = on(backend, x)
        normed = backend.operations.norm(residual, on(backend, gain), 1e-6, on(backend, delta))
        q, k, v = (part.unflatten(1, (-1, size)) for part in normed.split(widths, dim=1))
        keys, values = (on(backend, history) for _ in range(2))
        turn = on(backend, np.cos(angles)), on(backend, np.sin(angles))
        backend.operations.rotary_and_cache(q, k, v, *turn, keys, values, on(backend, slots), False)
        starts, lengths = (on(backend, np.array(numbers, np.int32)) for numbers in ([0, 1, 19], [21, 18]))
        attended = backend.operations.attention(
            q, keys, values, on(backend, tables), starts, lengths, 18, size**-0.5, "exact"
        )
        gated = backend.operations.activate(*attended.flatten(1).chunk(2, dim=1), "silu")
        return [tensor.cpu() for tensor in (residual, normed, keys, values, attended, gated)]

    for ours, theirs in zip(layer(TRITON), layer(CPU), strict=True):
        assert relative_error(ours, theirs) < 2e-6
