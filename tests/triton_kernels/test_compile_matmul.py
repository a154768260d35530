"""The products compiled for GPUs: what only the machine code shows, as far as a machine without a GPU can tell.

The child process of `compile_launches` imports this file for `launches`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest
import torch

from trichord import triton_kernels
from trichord.weight_format import Weight, WeightFormat

ROWS, COLUMNS = 256, 4096
FORMATS = sorted(triton_kernels.FUSED_FORMATS, key=lambda weight_format: weight_format.ggml_id)
# One format of each kind, for the kernels in which only the decode function differs between formats.
KINDS = [WeightFormat.F32, WeightFormat.BF16, WeightFormat.Q4_K, WeightFormat.Q6_K]
NARROW = {"F16", "BF16"}  # formats of which a group fills less than 16 bytes
FLOATS = {"F32", "F16", "BF16", "F64"}


def launches(target: str) -> dict[str, Callable[[], object]]:
    """Every call to compile, by name. AMD's compiler sees each format and each kernel, but not each pair."""
    calls = {}
    for weight_format in FORMATS:
        row_bytes = weight_format.row_bytes(COLUMNS)
        data = triton_kernels.pack(torch.zeros((ROWS, row_bytes), dtype=torch.uint8), weight_format, COLUMNS)
        weight = Weight(data, weight_format, (ROWS, COLUMNS), "planes")
        cases = [(1, "default")]
        if target == "sm_90":
            cases.append((64, "default"))
        if weight_format in KINDS:
            cases += [(8, "default"), (1, "fast"), (1, "exact"), (64, "exact"), (16, "default"), (128, "default")]
            calls[f"{weight_format.name} embedding"] = lambda weight=weight: triton_kernels.embedding(
                torch.zeros(3, dtype=torch.int64), weight
            )
            calls[f"{weight_format.name} dequantize"] = lambda weight=weight: triton_kernels.dequantize(weight)
        for tokens, precision in cases:
            x = torch.zeros((tokens, COLUMNS))
            calls[f"{weight_format.name} {tokens} {precision}"] = lambda x=x, weight=weight, precision=precision: (
                triton_kernels.matmul(x, [weight], precision)
            )
    return calls


@pytest.fixture(scope="module")
def kernels():
    """kernels[target][call] -> the compiled kernels of the call, the product last."""
    from compile_launches import compile_launches

    return compile_launches(os.path.abspath(__file__))


def products(kernels, target: str, pattern: str) -> dict[str, object]:
    found = {call: compiled[-1] for call, compiled in kernels[target].items() if re.fullmatch(pattern, call)}
    assert found
    return found


def test_nothing_spills(kernels):
    for target in kernels:
        spilled = {call: k.spills for call, compiled in kernels[target].items() for k in compiled if k.spills}
        assert not spilled, target


def test_nothing_wants_more_shared_memory_than_there_is(kernels):
    for target, limit in (("sm_90", 227 * 1024), ("gfx942", 64 * 1024)):
        assert max(k.shared for compiled in kernels[target].values() for k in compiled) <= limit


def test_many_rows_run_on_tensor_cores(kernels):
    for call, kernel in products(kernels, "sm_90", r"(?!F32|F64)\w+ (16|64|128) default").items():
        assert "wgmma.mma_async.sync.aligned.m64" in kernel.asm, call
        assert set(re.findall(r"wgmma[\w.]*\.f32\.(\w+)\.(\w+)", kernel.asm)) == {("f16", "f16")}, call
    for call, kernel in products(kernels, "gfx942", r"(BF16|Q4_K|Q6_K) (16|128) default").items():
        assert "v_mfma_f32" in kernel.asm and "_f16" in kernel.asm, call


def test_no_operand_is_rounded_to_tf32_or_bf16(kernels):
    for call, kernel in products(kernels, "sm_90", r"\w+ \d+ (default|exact)").items():
        assert "tf32" not in kernel.asm, call
        assert "cvt.rn.bf16" not in kernel.asm, call
    for call, kernel in products(kernels, "sm_90", r"\w+ \d+ exact|(F32|F64) 64 default").items():
        assert "mma" not in kernel.asm, call


def test_few_rows_multiply_integers_four_at_a_time(kernels):
    for call, kernel in products(kernels, "sm_90", r"\w+ [18] (default|fast)").items():
        if call.split()[0] not in FLOATS:
            assert "dp4a.s32.s32" in kernel.asm, call
    for call, kernel in products(kernels, "gfx942", r"\w+ [18] (default|fast)").items():
        if call.split()[0] not in FLOATS:
            assert "v_dot4_i32_i8" in kernel.asm, call


def test_few_rows_load_codes_and_activations_16_bytes_at_a_time(kernels):
    for call, kernel in products(kernels, "sm_90", r"\w+ 1 default").items():
        wide = len(re.findall(r"ld\.global[\w.]*\.(?:v4\.b32|v2\.b64)", kernel.asm))
        name = call.split()[0]
        activations = 1 if name in FLOATS else 4
        codes = 4 if name not in NARROW else 0  # one load for each of the rows of a program
        assert wide >= activations + codes, call
