"""Every configuration of launches compiled for its GPU: tiles whose registers spill are not worth shipping.

The child process of `compile_launches` imports this file for `launches`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest
import torch

from trichord import triton_kernels
from trichord.triton_kernels import launch
from trichord.weight_format import Weight, WeightFormat

CONFIGURATIONS = [each for each in launch.configurations() if each.target != "interpreter"]
MAIN_FORMAT = "Q4_K"
# What a decode function takes varies: formats without a minimum, with a codebook, of floats.
MORE_FORMATS = {"sm_90": ("Q6_K", "IQ3_S", "F16"), "gfx1100": ("Q6_K",)}
COLUMNS = 4096
SHARED = {
    "sm_75": 64,
    "sm_80": 163,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_120": 99,
    "gfx942": 64,
    "gfx1100": 64,
}


def launches(target: str) -> dict[str, Callable[[], object]]:
    """A product with each tile of the configurations for this target, by name."""
    calls = {}
    for configuration in CONFIGURATIONS:
        if configuration.target != target:
            continue
        for precision, table in (("default", configuration.gemm), ("exact", configuration.exact_gemm)):
            more = MORE_FORMATS.get(target, ()) if precision == "default" else ()
            for case in table:
                for name in [case.format] if case.format else [MAIN_FORMAT, *more]:
                    call = f"{name} {case.tokens} {precision} out {case.out}"
                    calls[call] = product(configuration, WeightFormat[name], case.tokens, case.out or 2048, precision)
    return calls


def product(
    configuration: launch.Launches, weight_format: WeightFormat, tokens: int, rows: int, precision: str
) -> Callable[[], object]:
    blocks = torch.zeros((rows, weight_format.row_bytes(COLUMNS)), dtype=torch.uint8)
    weight = Weight(
        triton_kernels.pack(blocks, weight_format, COLUMNS), weight_format, (rows, COLUMNS), triton_kernels.LAYOUT
    )

    def call() -> None:
        launch.use(configuration)
        triton_kernels.matmul(torch.zeros((max(tokens, launch.FEW_ROWS + 1), COLUMNS)), [weight], precision)

    return call


@pytest.fixture(scope="module")
def kernels():
    """kernels[target][call] -> the product's kernel."""
    from compile_launches import compile_launches

    targets = sorted({configuration.target for configuration in CONFIGURATIONS})
    compiled = compile_launches(os.path.abspath(__file__), targets, loops=True)
    found = {
        target: {call: kernel for call, each in calls.items() for kernel in each if kernel.name == "gemm_kernel"}
        for target, calls in compiled.items()
    }
    for target, calls in found.items():
        assert len(calls) >= 4, target
    return found


def test_nothing_spills(kernels):
    spilled = {(target, call): k.spills for target, calls in kernels.items() for call, k in calls.items() if k.spills}
    assert not spilled


def test_nothing_wants_more_shared_memory_than_there_is(kernels):
    for target, calls in kernels.items():
        assert max(kernel.shared for kernel in calls.values()) <= SHARED[target] * 1024, target


# Triton has no tensor-core product for Turing (sm_75).
CORES = {"sm_90": r"HGMMA", "sm_100": r"UTC\w*MMA", "gfx942": r"v_mfma_f32\w*f16", "gfx1100": r"v_wmma_f32\w*f16"}


@pytest.mark.parametrize("target", sorted({each.target for each in CONFIGURATIONS} - {"sm_75"}))
def test_halves_are_multiplied_on_tensor_cores(kernels, target):
    for call, kernel in kernels[target].items():
        cores = any(re.match(CORES.get(target, "HMMA"), code) for code in kernel.loop)
        assert cores == (" default " in call), call


def test_tensor_cores_of_hopper_do_not_wait_for_each_instruction(kernels):
    for call, kernel in kernels["sm_90"].items():
        if " default " in call:
            waits = sum(code.startswith("WARPGROUP.DEPBAR") for code in kernel.loop)
            assert 0 < 2 * waits <= sum(code.startswith("HGMMA") for code in kernel.loop), call
