"""Low-rank adapters (LoRA; Hu et al., 2106.09685): small matrices whose product is added beside a packed weight's.

A GGUF adapter holds, for a weight NAME (N, K), the tensors NAME.lora_a (r, K) and NAME.lora_b (N, r), or one such pair
an expert. y += strength * alpha / r * (x @ a.T) @ b.T; an alpha of 0 means r.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from trichord.device import Place
from trichord.errors import ModelError
from trichord.gguf_file import GGUFFile
from trichord.weights import load_vector


@dataclass(frozen=True)
class LowRank:
    """One weight's adapter: a (r, K), b (N, r), or (X, r, K), (X, N, r) of experts; b is scaled already."""

    a: torch.Tensor
    b: torch.Tensor

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, K) -> (T, N)."""
        return (x @ self.a.T) @ self.b.T

    def of_experts(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """x (T, K) or (T, E, K), experts (T, E) -> (T, E, N)."""
        chosen = experts.long()
        x = x[:, None] if x.ndim == 2 else x
        inner = torch.einsum("terk,tek->ter", self.a[chosen], x.expand(-1, experts.shape[1], -1))
        return torch.einsum("tenr,ter->ten", self.b[chosen], inner)


class Adapter:
    """One adapter file. `strength` multiplies all it adds."""

    def __init__(self, path: str | Path, strength: float, architecture: str) -> None:
        self.file = GGUFFile(path)
        self.strength = strength
        if (kind := self.file.get("adapter.type", str)) != "lora":
            raise ModelError(f"{self.file.path.name}: is no LoRA adapter (adapter.type is {kind!r}).")
        made_for = self.file.require("general.architecture", str)
        if made_for != architecture:
            raise ModelError(f"{self.file.path.name}: adapts models of architecture {made_for}, not {architecture}.")
        self.alpha = self.file.get("adapter.lora.alpha", float, 0.0)
        if not math.isfinite(self.alpha):
            raise ModelError(f"{self.file.path.name}: adapter.lora.alpha is {self.alpha}.")
        if not self.file.tensors:
            raise ModelError(f"{self.file.path.name}: adapts nothing, it has no tensors.")
        self.unused = set(self.file.tensors)

    def find(self, name: str, shape: tuple[int, ...], place: Place) -> LowRank | None:
        """The adapter of the weight `name` of this shape, if the file has one. Raises ModelError if it does not fit."""
        names = [f"{name}.lora_{side}" for side in "ab"]
        if not any(name in self.file.tensors for name in names):
            return None
        self.unused.difference_update(names)
        missing = next((name for name in names if name not in self.file.tensors), None)
        if missing:
            raise ModelError(f"{self.file.path.name}: tensor {missing!r} is missing.")
        a, b = (load_vector(self.file, name, place) for name in names)
        rank = a.shape[-2] if a.ndim == len(shape) else 0
        if a.shape != (*shape[:-2], rank, shape[-1]) or b.shape != (*shape[:-1], rank) or not rank:
            raise ModelError(
                f"{self.file.path.name}: an adapter of shapes {tuple(a.shape)} and {tuple(b.shape)} does not fit "
                f"{name!r} of shape {shape}."
            )
        return LowRank(a, b * (self.strength * (self.alpha / rank if self.alpha else 1.0)))


def check_all_used(adapters: Iterable[Adapter]) -> None:
    """Raises ModelError when an adapter changes a tensor that this model does not multiply by."""
    for adapter in adapters:
        if adapter.unused:
            raise ModelError(
                f"{adapter.file.path.name}: adapts {min(adapter.unused).rsplit('.lora_')[0]!r}, "
                "which the model does not have or does not multiply by."
            )
