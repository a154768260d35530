"""Trichord: GPU-first inference for GGUF language models.

The names below load on first use (PEP 562), so that `import trichord` and `trichord --help` stay instant: importing
torch alone takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trichord.dispatch import dispatch_matmul as dispatch_matmul
    from trichord.errors import TrichordError as TrichordError
    from trichord.gguf_file import GGUFFile as GGUFFile
    from trichord.llm import LLM as LLM
    from trichord.outputs import CompletionOutput as CompletionOutput
    from trichord.outputs import RequestOutput as RequestOutput
    from trichord.sampling_params import SamplingParams as SamplingParams
    from trichord.tokenizers import Tokenizer as Tokenizer
    from trichord.weight_format import Weight as Weight
    from trichord.weight_format import WeightFormat as WeightFormat
    from trichord.weights import load_weight as load_weight

__version__ = "0.1.0"

_HOME = {
    "LLM": "llm",
    "SamplingParams": "sampling_params",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "Tokenizer": "tokenizers",
    "GGUFFile": "gguf_file",
    "WeightFormat": "weight_format",
    "Weight": "weight_format",
    "load_weight": "weights",
    "dispatch_matmul": "dispatch",
    "TrichordError": "errors",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"trichord.{_HOME[name]}"), name)
    raise AttributeError(f"module 'trichord' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
