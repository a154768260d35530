"""Norm, rotary embedding, attention and activation compiled for GPUs: what only the machine code shows.

The child process of `compile_launches` imports this file for `launches`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest
import torch

from trichord import triton_kernels

TOKENS, HEADS, KV_HEADS, PAGE = 3, 8, 2, 64
ACTIVATIONS = "silu", "gelu", "gelu_erf", "relu", "relu_squared", "swiglu_oai"


def attention(
    size: int,
    precision: str,
    dtype: torch.dtype = torch.float16,
    values: int = 0,
    fresh: bool | None = None,
    **variant: object,
) -> Callable[[], object]:
    """A prompt's chunk and a single token whose context is split: every kernel of attention.

    With `values` these are that many last elements of the keys: a latent of one head. `fresh`: keys and values that are
    not in the cache yet; whether their pairs are interleaved.
    """
    q = torch.zeros((TOKENS, HEADS, size))
    keys = torch.zeros((4, 1 if values else KV_HEADS, PAGE, size), dtype=dtype)
    tables = torch.zeros((1, 4), dtype=torch.int32)
    starts, lengths = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    paged = q, keys, keys[..., -values:] if values else keys.clone(), tables, starts, lengths
    if dtype == torch.int8:
        scales = torch.zeros((*keys.shape[:3], -(-size // 32)), dtype=torch.float16)
        variant |= {"key_scales": scales, "value_scales": scales.clone()}
    if fresh is not None:
        k, angles = torch.zeros((TOKENS, keys.shape[1], size)), torch.zeros((TOKENS, 32))
        slots = torch.zeros(TOKENS, dtype=torch.int64)
        variant["fresh"] = k, None if values else k.clone(), angles, angles, slots, fresh

    def call() -> None:
        for max_query in (TOKENS, 1):
            triton_kernels.attention(*paged, max_query, 1.0, precision, **variant)

    return call


def rotary(interleaved: bool, with_values: bool = True, dtype: torch.dtype = torch.float16) -> Callable[[], object]:
    """Partly rotated heads, slices of one product."""
    q, k, v = torch.zeros((TOKENS, HEADS + 2 * KV_HEADS, 80)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    angles, cache = torch.zeros((TOKENS, 16)), torch.zeros((4, KV_HEADS, PAGE, 80), dtype=dtype)
    slots = torch.zeros(TOKENS, dtype=torch.int64)
    v, values = (v, cache) if with_values else (None, None)
    scales = torch.zeros((4, KV_HEADS, PAGE, 3), dtype=torch.float16) if dtype == torch.int8 else None
    return lambda: triton_kernels.rotary_and_cache(
        q, k, v, angles, angles, cache, values, slots, interleaved, key_scales=scales, value_scales=scales
    )


def recurrent() -> dict[str, Callable[[], object]]:
    """Mamba, Mamba-2, the delta rule by heads and by channels, lightning attention, at the shapes of models."""
    slots, starts = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)

    def convolution(tokens: int) -> object:
        x, kernel = torch.zeros((tokens, 8192)), torch.zeros((8192, 4))
        return triton_kernels.short_convolution(x, kernel, x[0], torch.zeros((1, 8192, 3)), slots, starts, "silu")

    def selective(heads: int, rows: int, columns: int, rates: int) -> object:
        x, steps, b = (
            torch.zeros((TOKENS, heads, rows)),
            torch.zeros((TOKENS, heads)),
            torch.zeros((TOKENS, 1, columns)),
        )
        state = torch.zeros((1, heads, rows, columns))
        return triton_kernels.state_scan(x, steps, torch.zeros((heads, rates)), b, b, state, slots, starts)

    def delta(groups: int, size: int, decays: int, gated: bool) -> object:
        k, v, beta = torch.zeros((TOKENS, groups, size)), torch.zeros((TOKENS, 32, size)), torch.zeros((TOKENS, 32))
        decay, state = torch.zeros((TOKENS, 32, decays)), torch.zeros((1, 32, size, size))
        return triton_kernels.delta_scan(k, k, v, decay, beta if gated else None, state, slots, starts)

    return {
        "convolution": lambda: (convolution(TOKENS), convolution(1)),
        "mamba": lambda: selective(5120, 1, 16, 16),
        "mamba2": lambda: selective(80, 64, 128, 1),
        "delta net": lambda: delta(16, 128, 1, True),
        "delta by channels": lambda: delta(32, 128, 128, True),
        "lightning": lambda: delta(32, 256, 1, False),
    }


def launches(target: str) -> dict[str, Callable[[], object]]:
    """Every call to compile, by name."""
    x, wide = torch.zeros((TOKENS, 4096)), torch.zeros((TOKENS, 20480))
    calls = {
        "norm": lambda: triton_kernels.norm(x, x[0], 1e-5, x),
        "prepared norm": lambda: triton_kernels.norm(x, x[0], 1e-5, x, prepare="default"),
        "wide prepared norm": lambda: triton_kernels.norm(wide, wide[0], 1e-5, wide, centered=True, prepare="default"),
        "wide norm": lambda: triton_kernels.norm(wide, wide[0], 1e-5),
        "layer norm": lambda: triton_kernels.norm(wide, None, 1e-5, bias=wide[0], centered=True),
        "norm of heads": lambda: triton_kernels.norm(x.view(TOKENS, 32, 128)[:, 3:], x[0, :128], 1e-5),
        **{name: lambda name=name: triton_kernels.activate(x, x, name) for name in ACTIVATIONS},
        "prepared silu": lambda: triton_kernels.activate(x, x, "silu", prepare="default"),
        "gelu alone": lambda: triton_kernels.activate(x, None, "gelu"),
        "rotary": rotary(False),
        "interleaved rotary": rotary(True),
        "keys alone": rotary(False, False),
        "rotary 8 bits": rotary(False, dtype=torch.int8),
        "interleaved rotary 8 bits": rotary(True, dtype=torch.int8),
    }
    for size in (128, 256) if target == "sm_90" else (256,):  # the widest asks for the most shared memory
        calls[f"attention {size} default"] = attention(size, "default", prepare=True)
        calls[f"attention {size} 8 bits"] = attention(size, "default", torch.int8)
        calls[f"attention {size} fresh"] = attention(size, "default", fresh=False, prepare=True)
        calls[f"attention {size} 8 bits fresh"] = attention(size, "default", torch.int8, fresh=True)
    calls["attention 128 exact"] = attention(128, "exact", torch.float32)
    calls["attention latent default"] = attention(576, "default", values=512)
    calls["attention latent fresh"] = attention(576, "default", values=512, fresh=True)
    if target == "sm_90":
        every = {"window": 100, "soft_cap": 50.0, "sinks": torch.zeros(HEADS), "slopes": torch.zeros(HEADS)}
        calls["attention variants default"] = attention(128, "default", **every)
        calls["attention latent exact"] = attention(576, "exact", torch.float32, values=512)
        calls["attention 256 exact half"] = attention(256, "exact")
    return calls | recurrent()


@pytest.fixture(scope="module")
def kernels():
    """kernels[target][call] -> the compiled kernels of the call; of attention's: prompt, single token, combination."""
    from compile_launches import compile_launches

    return compile_launches(os.path.abspath(__file__))


def test_nothing_spills(kernels):
    for target, calls in kernels.items():
        assert not {call: kernel.name for call in calls for kernel in calls[call] if kernel.spills}, target


def test_attention_launches_what_it_says(kernels):
    for calls in kernels.values():
        for call in calls:
            if call.startswith("attention"):  # wide results of many heads are combined by a kernel of their own
                combined = ["combine_kernel"] if "latent" in call else []
                before = ["rotary_and_cache_kernel"] if "fresh" in call else []
                names = [kernel.name for kernel in calls[call]]
                assert names == [*before, "attention_kernel", "attention_kernel", *combined], call


def test_the_last_split_sees_the_others_stores(kernels):
    """All threads' stores, then one thread's atomic that releases and acquires for all, then all threads' loads."""
    single = kernels["sm_90"]["attention 128 fresh"][-1].asm
    before, after = re.split(r"atom\.global\.gpu\.acq_rel\.add\.\w+", single)
    assert re.search(r"st\.global[^;]*;(?!.*st\.global).*bar\.sync", before, re.DOTALL)
    assert re.search(r"^(?:(?!ld\.global).)*bar\.sync.*ld\.global", after, re.DOTALL)
    single = kernels["gfx942"]["attention 256 fresh"][-1].asm
    before, after = re.split(r"global_atomic_add\w* ", single)
    assert re.search(r"s_waitcnt vmcnt\(0\).*s_barrier(?!.*global_store)", before, re.DOTALL)
    assert "buffer_inv sc1" in after


def test_scans_load_tokens_ahead(kernels):
    """Every load of the loop over tokens is an asynchronous copy, which the copies for the first tokens precede."""
    for call in recurrent().keys() - {"convolution"}:
        (kernel,) = kernels["sm_90"][call]
        before, *copies = kernel.asm.split("cp.async.commit_group")
        assert "ld.global" in before and len(copies) >= 3 * 4 and "ld.global" not in "".join(copies), call


@pytest.mark.parametrize("target, limit", [("sm_90", 227 * 1024), ("gfx942", 64 * 1024)])
def test_shared_memory_suffices(kernels, target, limit):
    assert max(kernel.shared for calls in kernels[target].values() for kernel in calls) <= limit


def test_an_8_bit_cache_is_read_as_bytes_and_multiplied_in_half_precision(kernels):
    for size in (128, 256):
        prompt, single = kernels["sm_90"][f"attention {size} 8 bits"]
        assert "wgmma.mma_async" in prompt.asm and "f32.f16.f16" in prompt.asm
        assert re.search(r"mma\.sync\S*\.f32\.f16\.f16\.f32", single.asm)
        for kernel in (prompt, single):
            assert "cvt.rn.f16.s16" in kernel.asm and "cvt.f32.f16" not in kernel.asm
            half = kernels["sm_90"][f"attention {size} default"][0 if kernel is prompt else 1]
            assert kernel.shared < half.shared


def test_exact_attention_multiplies_in_float32(kernels):
    for kernel in kernels["sm_90"]["attention 128 exact"] + kernels["sm_90"]["attention latent exact"]:
        assert "tf32" not in kernel.asm and "mma" not in kernel.asm
        assert "fma.rn.f32" in kernel.asm
    for kernel in kernels["gfx942"]["attention 128 exact"]:
        assert "xf32" not in kernel.asm and not re.search(r"v_mfma\w*f16", kernel.asm)


def test_default_attention_runs_on_tensor_cores_in_half_precision(kernels):
    for size in (128, 256):
        prompt, single = kernels["sm_90"][f"attention {size} default"]
        assert set(re.findall(r"wgmma\.mma_async\S*\.(f32\.f16\.f16)", prompt.asm)) == {"f32.f16.f16"}
        assert set(re.findall(r"mma\.sync\S*\.(\w+\.\w+\.\w+\.\w+) ", single.asm)) == {"f32.f16.f16.f32"}
    for kernel in kernels["gfx942"]["attention 256 default"][:2]:
        assert set(re.findall(r"v_mfma_f32_\d+x\d+x\d+_(\w+)", kernel.asm)) == {"f16"}


def test_single_tokens_stream_the_cache_sixteen_bytes_a_thread(kernels):
    _, single = kernels["sm_90"]["attention 128 default"]
    assert set(re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]+\], \[[^]]+\], (\w+)", single.asm)) >= {"0x10"}
