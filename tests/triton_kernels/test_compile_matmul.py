"""The products compiled for GPUs: what only the machine code shows, as far as a machine without a GPU can tell.

The child process of `compile_launches` imports this file for `launches`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from math import prod

import pytest
import torch

from trichord import triton_kernels
from trichord.triton_kernels.formats import FORMATS
from trichord.weight_format import Weight, WeightFormat

ROWS, COLUMNS = 256, 4096
FLOATS = {"F32", "F16", "BF16", "F64"}
# Products compiled for both targets: one format of each kind, since between others only the decode function differs.
PRODUCTS = {
    "F32": [(1, "default"), (64, "default")],
    "BF16": [(1, "default"), (64, "default")],
    "Q4_K": [
        (1, "default"),
        (1, "fast"),
        (1, "exact"),
        (8, "default"),
        (16, "default"),
        (64, "exact"),
        (128, "default"),
    ],
    "Q6_K": [(1, "default"), (8, "default"), (64, "default"), (128, "default")],
    "MXFP4": [(1, "default"), (64, "default")],
    "IQ3_S": [(1, "default"), (64, "default")],
}
# Tokens of 8 experts of 64: a matrix for each pair, or tiles of pairs.
EXPERT_PRODUCTS = {
    "F16": [(1, "default"), (100, "default")],
    "Q4_K": [(1, "default"), (1, "exact"), (100, "default"), (4096, "default")],
    "Q6_K": [(1, "fast"), (512, "default")],
}
# Weights with the same activations: the mixes of common files.
TOGETHER = [
    ("Q4_K", "Q4_K", "Q6_K"),
    ("Q4_K", "Q4_K"),
    ("Q5_K", "Q5_K", "Q6_K"),
    ("Q8_0", "Q8_0", "Q8_0"),
    ("IQ4_XS", "IQ4_XS", "Q5_K"),
]


def zeros(weight_format: WeightFormat, *shape: int) -> Weight:
    columns = shape[-1]
    blocks = torch.zeros((prod(shape[:-1]), weight_format.row_bytes(columns)), dtype=torch.uint8)
    return Weight(triton_kernels.pack(blocks, weight_format, columns), weight_format, shape, "planes")


def launches(target: str) -> dict[str, Callable[[], object]]:
    """Every call to compile, by name. For sm_90 each format's product with one row is among them."""
    calls = {}
    # Triton takes arguments that are 1 as constants, which have no methods.
    for name, columns in ("F32", 1), ("Q8_0", 32):
        for tokens in 1, 9:
            x, weight = torch.zeros((tokens, columns)), zeros(WeightFormat[name], 1, columns)
            calls[f"one row of {name}, {tokens} rows of x"] = partial(triton_kernels.matmul, x, [weight], "default")
    for weight_format in sorted(FORMATS, key=lambda weight_format: weight_format.ggml_id):
        name, weight = weight_format.name, zeros(weight_format, ROWS, COLUMNS)
        for tokens, precision in PRODUCTS.get(name, [(1, "default")] if target == "sm_90" else []):
            x = torch.zeros((tokens, COLUMNS))
            calls[f"{name} {tokens} {precision}"] = partial(triton_kernels.matmul, x, [weight], precision)
        if name in ("F32", "Q6_K", "IQ3_S"):
            calls[f"{name} dequantize"] = partial(triton_kernels.dequantize, weight)
            calls[f"{name} embedding"] = partial(triton_kernels.embedding, torch.zeros(3, dtype=torch.int64), weight)
    for names in TOGETHER:
        weights = [zeros(WeightFormat[name], ROWS, COLUMNS) for name in names]
        for tokens in (1, 8) if len(set(names)) == 2 else (1,):
            x, biases = torch.zeros((tokens, COLUMNS)), [torch.zeros(ROWS)] * len(weights)
            calls[f"{'+'.join(names)} {tokens}"] = partial(triton_kernels.matmul, x, weights, "default", biases)
    for name, products in EXPERT_PRODUCTS.items():
        weight = zeros(WeightFormat[name], 64, ROWS, COLUMNS)
        for tokens, precision in products:
            x, experts = torch.zeros((tokens, COLUMNS)), torch.zeros((tokens, 8), dtype=torch.int32)
            calls[f"{name} {tokens} {precision} by experts"] = partial(
                triton_kernels.expert_matmul, x, [weight], experts, precision
            )
    for gating, groups in (("softmax", 1), ("sigmoid", 8), ("softmax_of_chosen", 1)):
        logits, bias = torch.zeros((3, 256)), torch.zeros(256) if groups > 1 else None
        calls[f"route by {gating}"] = partial(
            triton_kernels.route,
            logits,
            8,
            gating,
            bias,
            groups=groups,
            groups_used=max(1, groups // 2),
            normalize=True,
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
    for call, kernel in products(kernels, "sm_90", r"(?!F32)\w+ (16|64|128) default").items():
        assert "wgmma.mma_async.sync.aligned.m64" in kernel.asm, call
        assert set(re.findall(r"wgmma[\w.]*\.f32\.(\w+)\.(\w+)", kernel.asm)) == {("f16", "f16")}, call
    for call, kernel in products(kernels, "gfx942", r"(?!F32)\w+ (16|64|128) default").items():
        assert "v_mfma_f32" in kernel.asm and "_f16" in kernel.asm, call


def test_experts_run_as_plain_products_do(kernels):
    for target, dot, many in (("sm_90", "dp4a.s32.s32", "wgmma"), ("gfx942", "v_dot4_i32_i8", "v_mfma_f32")):
        for call, kernel in products(kernels, target, r"Q\w+ 1 (default|fast) by experts").items():
            assert dot in kernel.asm, call
        for call, kernel in products(kernels, target, r"\w+ \d{3,} default by experts").items():
            assert many in kernel.asm, call


def test_weights_of_several_formats_are_one_launch(kernels):
    for target in kernels:
        for names in map("+".join, TOGETHER):
            assert [k.name for k in kernels[target][f"{names} 1"]] == ["limb_kernel", "gemv_kernel"], (target, names)


def test_no_operand_is_rounded_to_tf32_or_bf16(kernels):
    for call, kernel in products(kernels, "sm_90", r"\w+ \d+ (default|exact)").items():
        assert "tf32" not in kernel.asm, call
        assert "cvt.rn.bf16" not in kernel.asm, call
    for call, kernel in products(kernels, "sm_90", r"\w+ \d+ exact|F32 64 default").items():
        assert "mma" not in kernel.asm, call


def test_few_rows_multiply_integers_four_at_a_time(kernels):
    for call, kernel in products(kernels, "sm_90", r"\w+ [18] (default|fast)").items():
        if call.split()[0] not in FLOATS:
            assert "dp4a.s32.s32" in kernel.asm, call
    for call, kernel in products(kernels, "gfx942", r"\w+ [18] (default|fast)").items():
        if call.split()[0] not in FLOATS:
            assert "v_dot4_i32_i8" in kernel.asm, call


def test_few_rows_load_16_bytes_of_activations_and_a_group_of_codes_at_once(kernels):
    for call, kernel in products(kernels, "sm_90", r"(?!F64)\w+ 1 default").items():
        loads = Counter(int(width) for width in re.findall(r"ld\.global[\w.]*\.v(\d)\.b32", kernel.asm))
        format = FORMATS[WeightFormat[call.split()[0]]]
        activations = 4 if format.integer else 1
        codes = min(4, format.planes[0].size * format.group_size // format.planes[0].weights // 4)
        rows = 4  # of the weight in a program
        if codes == 4:
            assert loads[4] >= activations + rows, call
        else:
            assert loads[4] >= activations, call
            assert codes == 1 or loads[codes] >= rows, call
