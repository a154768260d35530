"""Models with recurrent layers or latent attention against llama.cpp's logits, through the Triton kernels.

A few tokens, in two steps: the second goes on from what the first has left in slots and pages.
"""

from __future__ import annotations

import numpy as np
import pytest
from support import parity, relative_error

from trichord import LLM


@pytest.mark.parametrize("name", ["qwen35-dense", "mamba2-dense", "deepseek2-moe"])
def test_logits_through_the_triton_kernels(name):
    path = parity(f"archs/{name}.gguf")
    with np.load(path.with_suffix(".npz")) as archive:
        tokens, expected = archive["tokens"][:5], archive["logits"][:5]
    llm = LLM(path, device="cuda", precision="exact", max_sequences=2, max_batch_tokens=3)
    assert relative_error(llm.logits(tokens), expected) < 1e-4
