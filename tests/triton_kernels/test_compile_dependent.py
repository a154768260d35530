"""Programmatic dependent launch, compiled: which kernels wait for the one before them, and before what.

The child process of `compile_launches` imports this file for `launches`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from trichord import Weight, WeightFormat, triton_kernels
from trichord.triton_kernels import launch

TARGETS = "sm_80", "sm_90", "sm_100", "gfx942"


def launches(target: str) -> dict[str, Callable[[], object]]:
    """The kernels of a decoding step, as the target's configuration launches them, and started ahead where it can."""

    def weight(format: WeightFormat) -> Weight:
        blocks = torch.zeros((256, format.row_bytes(4096)), dtype=torch.uint8)
        return Weight(triton_kernels.pack(blocks, format, 4096), format, (256, 4096), "planes")

    x, weights = torch.zeros((1, 4096)), [weight(WeightFormat.Q4_K), weight(WeightFormat.Q6_K)]
    q, k = torch.zeros((1, 32, 128)), torch.zeros((1, 8, 128))
    keys, angles = torch.zeros((4, 8, 64, 128), dtype=torch.float16), torch.zeros((1, 64))
    tables, slots = torch.zeros((1, 4), dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    starts, lengths = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    fresh = k, k.clone(), angles, angles, slots, False
    paged = keys, keys.clone(), tables, starts, lengths, 1, 1.0, "default"
    latent, wide = torch.zeros((4, 1, 64, 576), dtype=torch.float16), torch.zeros((1, 128, 576))
    latents = latent, latent[..., 64:], tables, starts, lengths, 1, 1.0, "default"
    calls = {
        "norm": lambda: triton_kernels.norm(x, x[0], 1e-5, x, prepare="default"),
        "product": lambda: triton_kernels.matmul(x, weights, "default"),
        "attention": lambda: triton_kernels.attention(q, *paged, fresh=fresh, prepare=True),
        "latent attention": lambda: triton_kernels.attention(wide, *latents),
        "rotary": lambda: triton_kernels.rotary_and_cache(q, k, k, angles, angles, *paged[:2], slots, False),
        "gated product": lambda: triton_kernels.activated_matmul(x, [weights[0], weights[0]], "default", "silu"),
        "activation": lambda: triton_kernels.activate(x, x, "silu", prepare="default"),
    }
    own = launch.choose("", target, launch.configurations())

    def ahead(call: Callable[[], object]) -> None:
        launch.use(replace(own, pdl=True))
        try:
            call()
        finally:
            launch.use(None)

    if own.pdl_possible:
        calls |= {f"{name} ahead": lambda call=call: ahead(call) for name, call in calls.items()}
    return calls


@pytest.fixture(scope="module")
def kernels():
    """kernels[target][call] -> the compiled kernels of the call."""
    from compile_launches import compile_launches

    return compile_launches(os.path.abspath(__file__), TARGETS)


def test_only_where_it_is_asked_for(kernels):
    for target, calls in kernels.items():
        assert any(call.endswith("ahead") for call in calls) == (target in ("sm_90", "sm_100"))
        for call, members in calls.items():
            for kernel in members:
                assert ("griddepcontrol" in kernel.asm) == call.endswith("ahead"), (target, call, kernel.name)


def test_every_program_waits_before_its_first_access_to_memory_and_then_signals(kernels):
    for target in "sm_90", "sm_100":
        for call, members in kernels[target].items():
            for kernel in members if call.endswith("ahead") else ():
                before, after = re.split(r"griddepcontrol\.wait\s*;", kernel.asm)
                touched = re.search(r"\b(ld|st|atom|red)\.global|cp\.async|\bret;|\bbra\b", before)
                assert not touched, (call, kernel.name)
                assert after.count("griddepcontrol.launch_dependents") == 1, (call, kernel.name)
