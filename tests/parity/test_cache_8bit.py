"""The 8-bit key-value cache beyond its arithmetic: whole models, bytes, numbers that are not finite, refusals.

What is written and what attention reads are in `test_operations` and `test_attention`.
"""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from support import eight_bits, from_eight_bits, relative_error

from trichord import LLM, SamplingParams
from trichord.cache import PAGE_SIZE, KeyValueSpec, LatentSpec
from trichord.dispatch import Operations, operations

TRITON, CPU = operations("planes"), operations("blocks")
both = pytest.mark.parametrize("backend", [pytest.param(TRITON, id="triton"), pytest.param(CPU, id="cpu")])
not_finite = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
TOKENS = list(range(1, 60))


def device(backend: Operations) -> str:
    return "cuda" if backend is TRITON and torch.cuda.is_available() else "cpu"


def written(backend: Operations, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and scales that the backend makes of values (T, D), once as keys and once as values."""
    tokens, size = rows.shape
    x = torch.from_numpy(rows[:, None].copy()).to(device(backend))
    numbers = [torch.zeros((1, 1, 16, size), dtype=torch.int8, device=x.device) for _ in range(2)]
    scales = [torch.zeros((1, 1, 16, -(-size // 32)), dtype=torch.float16, device=x.device) for _ in range(2)]
    still, slots = torch.zeros((tokens, 0), device=x.device), torch.arange(tokens, device=x.device)
    caches = {"key_scales": scales[0], "value_scales": scales[1]}
    backend.rotary_and_cache(x.clone(), x, x, still, still, *numbers, slots, False, **caches)
    for parts in (numbers, scales):
        np.testing.assert_array_equal(*(part.cpu().numpy() for part in parts))
    return numbers[0][0, 0, :tokens].cpu().numpy(), scales[0][0, 0, :tokens].cpu().numpy()


def check_quantizer(backend: Operations) -> None:
    rows = np.random.default_rng(0).standard_normal((5, 70)).astype(np.float32)
    rows *= np.float32([[1], [1e-5], [3e4], [1], [1]])
    rows[3, :32] = 0
    rows[4, 40] = 8e6  # beyond float16 itself
    numbers, scales = written(backend, rows)
    expected_numbers, expected_scales = eight_bits(rows)
    np.testing.assert_array_equal(scales, expected_scales)
    assert (numbers != expected_numbers).mean() < 0.01 and abs(numbers.astype(int) - expected_numbers).max() <= 1
    assert scales[3, 0] == 0 and not numbers[3, :32].any()
    steps = np.repeat(scales.astype(np.float64), 32, axis=1)[:, :70]
    assert (abs(from_eight_bits(numbers, scales) - rows)[[0, 2, 3, 4]] <= 0.501 * steps[[0, 2, 3, 4]]).all()


@both
def test_groups_of_all_magnitudes(backend):
    check_quantizer(backend)


def check_not_finite(backend: Operations) -> None:
    rows = np.ones((2, 96), np.float32)
    rows[0, 5], rows[1, 40] = np.nan, -np.inf
    held = from_eight_bits(*written(backend, rows))
    assert not np.isfinite(held[0, 5]) and not np.isfinite(held[1, 40])
    np.testing.assert_allclose(held[0, 32:], 1, rtol=1e-3)
    np.testing.assert_allclose(held[1, [*range(32), *range(64, 96)]], 1, rtol=1e-3)


@both
@not_finite
def test_what_is_not_finite_spoils_its_group_only(backend):
    check_not_finite(backend)


@not_finite
def test_without_numba(monkeypatch):
    monkeypatch.setattr(importlib.import_module("trichord.cpu_fallback.rotary"), "have_numba", lambda: False)
    check_quantizer(CPU)
    check_not_finite(CPU)


@both
def test_values_among_keys_of_8_bits_are_refused(backend):
    keys = torch.zeros((1, 1, 16, 96), dtype=torch.int8, device=device(backend))
    scales = torch.zeros((1, 1, 16, 3), dtype=torch.float16, device=keys.device)
    starts, lengths, table = (torch.tensor(x, dtype=torch.int32, device=keys.device) for x in ([0, 1], [1], [[0]]))
    paged = torch.zeros((1, 1, 96), device=keys.device), keys, keys[..., 32:], table, starts, lengths
    with pytest.raises(ValueError, match="a cache of their own"):
        backend.attention(*paged, 1, 1.0, "default", key_scales=scales, value_scales=scales[..., 1:])


@pytest.mark.parametrize("size, value_size, of_half", [(64, 64, 34 / 64), (128, 128, 34 / 64), (80, 24, 0.5 + 4 / 104)])
def test_bytes_of_a_page(size, value_size, of_half):
    spec = KeyValueSpec(3, size, value_size)
    cache = spec.allocate(2, 1, torch.int8, torch.device("cpu"))
    parts = cache.keys, cache.values, cache.key_scales, cache.value_scales
    assert sum(part.nbytes for part in parts) == 2 * spec.page_bytes(torch.int8)
    assert spec.page_bytes(torch.int8) == spec.page_bytes(torch.float16) * of_half


def test_latents_keep_16_bits():
    spec = LatentSpec(512, 64)
    cache = spec.allocate(2, 1, torch.int8, torch.device("cpu"))
    assert cache.keys.dtype == torch.float16 and cache.key_scales is None
    assert cache.keys.nbytes == 2 * spec.page_bytes(torch.int8) == 2 * 2 * PAGE_SIZE * 576


def test_a_whole_model():
    exact, rounded, in_steps = (
        LLM(device="cpu", precision="exact", kv_dtype=kv_dtype, max_sequences=2, max_batch_tokens=batch)
        for kv_dtype, batch in (("f32", 64), ("q8", 64), ("q8", 7))
    )
    logits = exact.logits(TOKENS)
    for llm in (rounded, in_steps):  # the later steps read what the earlier ones wrote
        assert 1e-5 < relative_error(llm.logits(TOKENS), logits) < 1e-2
    params = SamplingParams(max_tokens=20, temperature=0)
    texts = [llm.generate("Once upon", params)[0].outputs[0].text for llm in (exact, rounded)]
    assert texts[0] == texts[1] and len(texts[0]) > 40


def test_a_whole_model_through_the_triton_kernels():
    on_cpu, on_gpu = (LLM(device=d, precision="exact", kv_dtype="q8", max_sequences=1) for d in ("cpu", "cuda"))
    assert relative_error(on_gpu.logits(TOKENS[:12]), on_cpu.logits(TOKENS[:12])) < 1e-3
