"""Every architecture that has a record, against llama.cpp's logits of a tiny random model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from support import PARITY, relative_error

from trichord import LLM, GGUFFile
from trichord.models.architectures import ARCHITECTURES
from trichord.weights import load_vector

FOLDER = PARITY / "archs"
if not FOLDER.is_dir():
    pytest.skip(f"parity data not found: {FOLDER} (set TRICHORD_PARITY_DATA)", allow_module_level=True)

EXCLUDED = {
    "refact-moe": "llama.cpp ignores the experts of such a file, which no converter writes",
    "hrm_text-dense": "has scales for blocks without weights: see test_recurrence",
}


def architecture(path: Path) -> str:
    return GGUFFile(path).metadata["general.architecture"]


MODELS = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.skip(EXCLUDED[path.stem])] if path.stem in EXCLUDED else [])
    for path in sorted(FOLDER.glob("*.gguf"))
    if architecture(path) in ARCHITECTURES
]


def load(path: Path, **options) -> LLM:
    return LLM(path, device="cpu", precision="exact", max_sequences=2, **options)


@pytest.mark.parametrize("path", MODELS)
def test_logits(path):
    with np.load(path.with_suffix(".npz")) as reference:
        tokens, expected = reference["tokens"], reference["logits"]
    llm = load(path)
    whole = llm.logits(tokens)
    # llama.cpp takes GELU from a table of half-precision numbers.
    bound = 1e-3 if llm.config.architecture.activation.startswith("gelu") else 1e-5
    assert relative_error(whole, expected) < bound
    if llm.config.architecture.causal:
        assert relative_error(load(path, max_batch_tokens=7).logits(tokens), whole) < 1e-5


def test_recurrence():
    """llama.cpp multiplies by scales of blocks that the file has only these of: they are given to the passes here."""
    path = FOLDER / "hrm_text-dense.gguf"
    with np.load(path.with_suffix(".npz")) as reference:
        tokens, expected = reference["tokens"], reference["logits"]
    llm = load(path)
    block = llm.model.recurrence.block
    assert [block(layer) for layer in range(6)] == [0, 0, 1, 0, 0, 1]

    def scaled(linear, name):
        scale = load_vector(llm.file, f"{name}.scale", llm.model.outer).item()
        return dataclasses.replace(linear, weight=dataclasses.replace(linear.weight, scale=scale))

    class ScaledLayer:
        def __init__(self, index, layer):
            self.place, self.layer, self.attention = layer.place, layer, layer.mixers[0]
            attention, names = self.attention, [f"blk.{index}.attn_{name}" for name in ("q", "k", "v", "output")]
            self.linears = [
                scaled(y, name) for y, name in zip([*attention.inputs, attention.output], names, strict=True)
            ]

        def forward(self, *arguments):
            attention = self.attention
            kept = attention.inputs, attention.output
            attention.inputs, attention.output = self.linears[:3], self.linears[3]
            try:
                return self.layer.forward(*arguments)
            finally:
                attention.inputs, attention.output = kept

    layers = llm.model.layers
    llm.model.layers = [ScaledLayer(i, layer) if i > 1 else layer for i, layer in enumerate(layers)]
    assert relative_error(llm.logits(tokens), expected) < 1e-5
