"""Whole models against llama.cpp's logits, through both backends."""

from __future__ import annotations

import numpy as np
import pytest
from support import parity, relative_error

from trichord import LLM

ARCHITECTURES = ["llama-dense", "llama-rope-base", "llama-rope-linear", "llama-rope-yarn", "qwen2-dense"]
QUANTS = [f"llama-{name}" for name in (
    *("F16", "BF16", "Q1_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K_S", "Q4_K_S", "Q5_K_S", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"),
    *("IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "dense-Q4_K_M", "moe-Q4_K_M", "moe-MXFP4"),
)] + [f"{name}-Q4_K_M" for name in (
    *("gemma2-dense", "gemma3-dense", "phi3-dense", "qwen2-dense", "qwen3-dense", "qwen3moe-moe"),
)]  # fmt: skip
STEPPED = ["llama-F16", "llama-Q5_0", "llama-Q6_K", "llama-IQ3_XXS", "qwen2-dense-Q4_K_M", "qwen3moe-moe-Q4_K_M"]
# Exact logits agree to float32 rounding; on the GPU sums run in another order, and transcendentals are coarser.
EXACT = {"cpu": 1e-5, "cuda": 1e-4}


def model(name: str, device: str = "cpu", **options) -> tuple[LLM, dict[str, np.ndarray]]:
    path = parity(f"{name}.gguf")
    with np.load(path.with_suffix(".npz")) as archive:
        reference = dict(archive)
    return LLM(path, device=device, max_sequences=4, **options), reference


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_llama_cpps(name):
    llm, reference = model(f"archs/{name}", precision="exact")
    assert relative_error(llm.logits(reference["tokens"]), reference["logits"]) < EXACT["cpu"]


@pytest.mark.parametrize(("name", "chunk"), [("llama-dense", 3), ("llama-rope-yarn", 40), ("qwen2-dense", 12)])
def test_logits_through_the_triton_kernels(name, chunk):
    llm, reference = model(f"archs/{name}", "cuda", precision="exact", max_batch_tokens=chunk)
    tokens = reference["tokens"][: max(chunk, 12)]
    assert relative_error(llm.logits(tokens), reference["logits"][: len(tokens)]) < EXACT["cuda"]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("chunk", [1, 7])
def test_prefill_agrees_with_token_by_token(name, chunk):
    llm, reference = model(f"archs/{name}", precision="exact", max_batch_tokens=chunk)
    assert relative_error(llm.logits(reference["tokens"]), reference["logits"]) < EXACT["cpu"]


@pytest.mark.parametrize("quant", QUANTS)
def test_quantized_logits_are_exact(quant):
    llm, reference = model(f"quants/{quant}", precision="exact")
    # The reference took GELU from a table of half-precision numbers.
    bound = 1e-4 if quant.startswith("gemma") else 1e-5
    assert relative_error(llm.logits(reference["tokens"]), reference["exact"]) < bound


@pytest.mark.parametrize("precision", ["default", "fast"])
@pytest.mark.parametrize(("quant", "chunk"), [(quant, 48) for quant in QUANTS] + [(quant, 1) for quant in STEPPED])
def test_quantized_logits_are_nearer_the_truth_than_llama_cpps(quant, precision, chunk):
    llm, reference = model(f"quants/{quant}", precision=precision, max_batch_tokens=chunk)
    error = relative_error(llm.logits(reference["tokens"]), reference["exact"])
    theirs = relative_error(reference["llama_cpp"], reference["exact"])
    # "fast" rounds as llama.cpp does, so that the two differ by a few percent of their error either way.
    bound = {"llama-F16": 4e-4, "llama-BF16": 2.2e-3}.get(quant, 1e-3 if precision == "default" else 1.05 * theirs)
    assert error < bound


@pytest.mark.parametrize(
    ("quant", "precision", "chunk"),
    [
        ("llama-BF16", "default", 4),
        ("llama-Q8_0", "default", 2),
        ("llama-Q4_K_S", "default", 4),
        ("llama-Q4_K_S", "default", 12),
        ("llama-Q4_K_S", "exact", 12),
        ("llama-Q6_K", "fast", 1),
        ("llama-Q6_K", "exact", 4),
        ("llama-Q6_K", "default", 12),
        ("llama-Q2_K", "default", 2),
        ("llama-Q5_0", "exact", 2),
        ("llama-IQ1_M", "default", 12),
        ("llama-IQ2_XS", "default", 2),
        ("llama-IQ3_S", "exact", 2),
        ("llama-IQ4_XS", "default", 12),
        ("llama-TQ1_0", "default", 2),
        ("llama-moe-MXFP4", "default", 2),
        ("llama-moe-Q4_K_M", "exact", 12),
        ("gemma2-dense-Q4_K_M", "default", 2),
        ("gemma3-dense-Q4_K_M", "exact", 12),
        ("phi3-dense-Q4_K_M", "default", 12),
        ("qwen3-dense-Q4_K_M", "default", 2),
        ("qwen3moe-moe-Q4_K_M", "default", 12),
    ],
)
def test_quantized_logits_through_the_triton_kernels(quant, precision, chunk):
    """Chunks of up to 8 rows take the few-row kernels, longer ones the tensor-core kernel."""
    llm, reference = model(f"quants/{quant}", "cuda", precision=precision, max_batch_tokens=chunk)
    count = max(chunk, 4)
    error = relative_error(llm.logits(reference["tokens"][:count]), reference["exact"][:count])
    theirs = relative_error(reference["llama_cpp"][:count], reference["exact"][:count])
    assert error < {"exact": 1e-4, "default": 1e-3, "fast": theirs}[precision]


def test_layers_on_two_devices_agree_with_one():
    llm, reference = model("archs/llama-dense", "cuda", precision="exact", gpu_layers=1)
    tokens = reference["tokens"][:12]
    assert relative_error(llm.logits(tokens), reference["logits"][:12]) < EXACT["cuda"]
