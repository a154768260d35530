"""What only the CPU backend has: the route without Numba, work spread over threads, numbers of half precision."""

from __future__ import annotations

import importlib
import re

import numpy as np
import pytest
import torch
from support import relative_error

from trichord import cpu_fallback
from trichord.cpu_fallback.jit import have_numba

NAMES = "norm", "rotary", "attention", "activation"
MODULES = {name: importlib.import_module(f"trichord.cpu_fallback.{name}") for name in NAMES}
needs_numba = pytest.mark.skipif(not have_numba(), reason="needs Numba")


@pytest.fixture
def without_numba(monkeypatch):
    for module in MODULES.values():
        monkeypatch.setattr(module, "have_numba", lambda: False)
    return monkeypatch


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32))


def paged(sequences: list[tuple[int, int]], kv_heads: int, size: int, page: int, dtype: torch.dtype):
    """Caches of (tokens, context) sequences, page tables, query starts and context lengths."""
    counts = [-(-context // page) for _, context in sequences]
    order = torch.from_numpy(np.random.default_rng(0).permutation(sum(counts)).astype(np.int32))
    tables = torch.full((len(counts), max(counts)), -1, dtype=torch.int32)
    for row, pages in zip(tables, order.split(counts), strict=True):
        row[: len(pages)] = pages
    keys, values = (normal(sum(counts), kv_heads, page, size, seed=seed).to(dtype) for seed in (1, 2))
    starts = torch.tensor([0, *np.cumsum([tokens for tokens, _ in sequences])], dtype=torch.int32)
    return keys, values, tables, starts, torch.tensor([context for _, context in sequences], dtype=torch.int32)


def attend(sequences: list[tuple[int, int]], heads: int, *shape) -> torch.Tensor:
    cache = paged(sequences, *shape)
    q = normal(int(cache[3][-1]), heads, shape[1])
    return cpu_fallback.attention(q, *cache, max(tokens for tokens, _ in sequences), 0.2, "exact")


def plain_attention(sequences: list[tuple[int, int]], heads: int, *shape) -> np.ndarray:
    """The same by torch in float64, one sequence at a time."""
    keys, values, tables, starts, _ = paged(sequences, *shape)
    q = normal(int(starts[-1]), heads, shape[1]).double()
    results = []
    for table, start, (tokens, context) in zip(tables, starts, sequences, strict=False):
        pages = table[: -(-context // shape[2])].long()
        key, value = (cache[pages].transpose(0, 1).flatten(1, 2)[:, :context].double() for cache in (keys, values))
        hidden = torch.ones(tokens, context, dtype=torch.bool).triu(context - tokens + 1)
        bias = torch.zeros(tokens, context, dtype=torch.float64).masked_fill(hidden, -torch.inf)
        mean = torch.nn.functional.scaled_dot_product_attention(
            q[start : start + tokens].transpose(0, 1), key, value, bias, scale=0.2, enable_gqa=True
        )
        results.append(mean.transpose(0, 1))
    return torch.cat(results).numpy()


RAGGED = [(1, 200), (70, 70), (5, 90), (1, 1)], 6, 2, 48, 16, torch.float16
ONE = [(1, 333)], 6, 3, 64, 64, torch.float32
REST = [(1, 40), (1, 700)], 2, 1, 36, 16, torch.float16  # heads of 36 leave a rest beyond vectors of eight


def test_attention_without_numba_in_several_blocks(without_numba, monkeypatch):
    monkeypatch.setattr(MODULES["attention"], "_BLOCK_TOKENS", 32)
    monkeypatch.setattr(MODULES["attention"], "_BLOCK_KEYS", 64)
    assert relative_error(attend(*RAGGED), plain_attention(*RAGGED)) < 1e-6


@needs_numba
@pytest.mark.parametrize("workers", [1, 3, 16])
@pytest.mark.parametrize("case", [RAGGED, ONE, REST], ids=["ragged", "one", "rest"])
def test_attention_split_for_any_number_of_threads(case, workers, monkeypatch):
    monkeypatch.setattr("trichord.cpu_fallback.attention_kernel.threads", lambda: workers)
    assert relative_error(attend(*case), plain_attention(*case)) < 1e-6


@needs_numba
@pytest.mark.parametrize("centered", [False, True])
def test_norm_without_numba(without_numba, centered):
    """As with Numba, which the tests of parity compare with float64 NumPy."""
    x, delta, gain = normal(3, 5, 20), normal(3, 5, 20, seed=1), normal(5, 20, seed=2)
    bias, expected = normal(20, seed=3), x.clone()
    cases = [(gain, bias), (gain[0], None), (None, None)]
    by_numpy = [cpu_fallback.norm(x, a, 1e-5, delta, bias=b, centered=centered) for a, b in cases]
    without_numba.undo()
    for y, (a, b) in zip(by_numpy, cases, strict=True):
        torch.testing.assert_close(y, cpu_fallback.norm(expected, a, 1e-5, delta, bias=b, centered=centered))
    torch.testing.assert_close(x, expected)


@needs_numba
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_erf", "relu", "relu_squared", "swiglu_oai"])
def test_activations_without_numba(without_numba, activation):
    gate, up = (10 * normal(2, 3, 300)).chunk(2, dim=2)
    cases = [(gate, up), (gate, None)]
    by_torch = [cpu_fallback.activate(*case, activation) for case in cases]
    without_numba.undo()
    for y, case in zip(by_torch, cases, strict=True):
        assert y.is_contiguous()
        torch.testing.assert_close(y, cpu_fallback.activate(*case, activation), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("with_values", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_without_numba(without_numba, interleaved, with_values):
    """Turning by +90 degrees swaps the numbers of a pair and negates the first."""
    q, k, v = normal(2, 3, 6), normal(2, 1, 6, seed=1), normal(2, 1, 5, seed=2)
    keys, values = torch.zeros(2, 1, 16, 6, dtype=torch.float16), torch.zeros(2, 1, 16, 5, dtype=torch.float16)
    pairs = [(0, 1), (2, 3)] if interleaved else [(0, 2), (1, 3)]
    expected_q, expected_k = q.clone(), k.clone()
    for x, before in ((expected_q, q.clone()), (expected_k, k.clone())):
        for left, right in pairs:
            x[..., left], x[..., right] = -before[..., right], before[..., left]
    slots = torch.tensor([17, 2])
    targets = (keys, values) if with_values else (keys, None)
    quarter = torch.zeros(2, 2), torch.ones(2, 2)
    cpu_fallback.rotary_and_cache(q, k, v if with_values else None, *quarter, *targets, slots, interleaved)
    torch.testing.assert_close(q, expected_q)
    for cache, written in ((keys, expected_k), (values, v))[: 1 + with_values]:
        assert torch.equal(torch.stack([cache[1, :, 1], cache[0, :, 2]]), written.half())
        assert cache.count_nonzero() == written.numel()


@needs_numba
def test_many_tokens_are_spread_over_threads():
    tokens = 40  # times the widths below: more than one thread's worth
    x, gain = normal(tokens, 2048), normal(2048)
    expected = x.double() / x.double().square().mean(1, keepdim=True).sqrt() * gain
    assert relative_error(cpu_fallback.norm(x, gain, 0.0), expected) < 1e-6
    torch.testing.assert_close(cpu_fallback.activate(x, x, "silu"), torch.nn.functional.silu(x) * x)
    q, k = normal(tokens, 24, 64), normal(tokens, 8, 64)
    expected_q = torch.cat([-q[..., 32:], q[..., :32]], dim=2)
    keys, values = torch.zeros(3, 8, 16, 64), torch.zeros(3, 8, 16, 64)
    slots = torch.arange(tokens).flip(0)
    quarter = torch.zeros(tokens, 32), torch.ones(tokens, 32)
    cpu_fallback.rotary_and_cache(q, k, k, *quarter, keys, values, slots, False)
    torch.testing.assert_close(q, expected_q)
    assert torch.equal(values.transpose(1, 2).flatten(0, 1)[slots], k)


@needs_numba
def test_halves_convert_like_numpys():
    from numba import njit

    from trichord.cpu_fallback.native import from_half, to_half

    @njit
    def convert(bits, numbers, source, target):
        for index in range(len(bits)):
            numbers[index] = from_half(bits[index])
        for index in range(len(source)):
            target[index] = to_half(source[index])

    every = np.arange(1 << 16, dtype=np.uint16)
    halves = every.view(np.float16)
    finite = np.sort(halves[np.isfinite(halves)]).astype(np.float32)
    middles = (finite[1:] + finite[:-1]) / 2
    extremes = np.array([65519.996, 65520, -65520, np.inf, -np.inf, np.nan, 1e-30, 3e38], np.float32)
    above, below = (np.nextafter(middles, np.float32(end)) for end in (np.inf, -np.inf))
    source = np.concatenate([finite, middles, above, below, extremes])
    numbers, bits = np.empty(len(every), np.float32), np.empty(len(source), np.uint16)
    convert(every, numbers, source, bits)
    np.testing.assert_array_equal(numbers, halves.astype(np.float32))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(bits.view(np.float16), source.astype(np.float16))


@needs_numba
def test_exponential():
    from numba import njit

    from trichord.cpu_fallback.native import exp

    @njit
    def exponentials(x, y):
        for index in range(len(x)):
            y[index] = exp(x[index])

    x = np.concatenate([np.linspace(-87, 88, 200_001), np.linspace(-1, 1, 100_001)]).astype(np.float32)
    y = np.empty_like(x)
    exponentials(x, y)
    np.testing.assert_allclose(y, np.exp(x.astype(np.float64)), rtol=2.5e-7)
    exponentials(np.array([-1e30, -89, 89, 1e30], np.float32), y)
    np.testing.assert_array_equal(y[:4], [0, 0, np.inf, np.inf])


@needs_numba
def test_loops_over_halves_and_exponentials_vectorize():
    """Eight or sixteen at a time where the CPU has AVX2 and F16C."""
    import llvmlite.binding as llvm
    from numba import njit

    from trichord.cpu_fallback.native import exp, from_half

    if not {"avx2", "f16c", "fma"} <= {name for name, present in llvm.get_host_cpu_features().items() if present}:
        pytest.skip("this CPU lacks AVX2 or F16C")

    @njit(error_model="numpy")
    def both(bits, y):
        for index in range(len(bits)):
            y[index] = exp(from_half(bits[index]))

    both(np.zeros(100, np.uint16), np.empty(100, np.float32))
    assembly = both.inspect_asm(both.signatures[0])
    assert re.search(r"vcvtph2ps\s[^\n]*, %[yz]mm", assembly)
    assert re.search(r"vfn?madd\w+ps\s[^\n]*%[yz]mm", assembly)
