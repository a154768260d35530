"""The architectures: one record each, naming what differs between decoder families. `decoder.py` interprets them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from trichord.errors import ModelError


@dataclass(frozen=True)
class Architecture:
    """A decoder family, by its `general.architecture`.

    `interleaved_rotary`: pairs are (2i, 2i+1), as the converter of Llama files permutes them; else (i, i + R/2).
    Biases and a separate output matrix are used where the file has their tensors.
    """

    name: str
    interleaved_rotary: bool


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", interleaved_rotary=True),
        Architecture("qwen2", interleaved_rotary=False),
    )
}


def find_architecture(name: str) -> Architecture:
    """The record of this name. Raises ModelError, with near names, for one that is not supported."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    near = difflib.get_close_matches(name, ARCHITECTURES, n=3) or sorted(ARCHITECTURES)
    raise ModelError(f"Architecture {name!r} is not supported; supported are {', '.join(near)}.")
