"""Weights with their biases, and where they come from: the tensors of a file, checked against the configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from trichord.device import Place
from trichord.dispatch import Precision, Prepared, expert_matmul, matmul
from trichord.errors import ModelError
from trichord.gguf_file import GGUFFile
from trichord.models.lora import Adapter, LowRank
from trichord.weight_format import Weight
from trichord.weights import load_vector, load_weight


@dataclass(frozen=True)
class Linear:
    """A weight and its bias, if the file has one: (N, K) and (N,), or (X, N, K) and (X, N) of experts."""

    weight: Weight
    bias: torch.Tensor | None = None
    adapters: tuple[LowRank, ...] = ()


def floats(x: torch.Tensor | Prepared) -> torch.Tensor:
    """The rows themselves, for what is no product."""
    return x if isinstance(x, torch.Tensor) else x.x


def project(x: torch.Tensor | Prepared, linears: Sequence[Linear], precision: Precision) -> list[torch.Tensor]:
    """x (T, K) through several linears that share their input and device: [(T, N), ...]."""
    products = matmul(x, [linear.weight for linear in linears], precision, [linear.bias for linear in linears])
    for y, linear in zip(products, linears, strict=True):
        for adapter in linear.adapters:
            y += adapter.of(floats(x))
    return products


def project_experts(
    x: torch.Tensor | Prepared, linears: Sequence[Linear], experts: torch.Tensor, precision: Precision
) -> list[torch.Tensor]:
    """x (T, K) or (T, E, K) through the matrices of each token's experts (T, E): [(T, E, N), ...]."""
    products = expert_matmul(x, [linear.weight for linear in linears], experts, precision)
    for y, linear in zip(products, linears, strict=True):
        if linear.bias is not None:
            y += linear.bias[experts.long()]
        for adapter in linear.adapters:
            y += adapter.of_experts(floats(x), experts)
    return products


@dataclass(frozen=True)
class TensorSource:
    """Loads the tensors below `prefix` to one device, checking each against the shape that is expected of it.

    `loaded` is told the bytes of every weight. Optional tensors among `unused` count as missing. `adapters` change
    the linears they have tensors for. `expert_place` is where experts' matrices go, if not to `place`.
    """

    file: GGUFFile
    place: Place
    loaded: Callable[[int], None]
    unused: tuple[str, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    prefix: str = ""
    expert_place: Place | None = None

    def within(self, prefix: str) -> TensorSource:
        """The tensors below a further prefix."""
        return replace(self, prefix=f"{self.prefix}{prefix}")

    def of_experts(self) -> TensorSource:
        """The same tensors, loaded to where experts' matrices go."""
        return replace(self, place=self.expert_place or self.place)

    def has(self, name: str) -> bool:
        """Whether the file has `name.weight`."""
        return self.has_tensor(f"{name}.weight")

    def has_tensor(self, name: str) -> bool:
        """Whether the file has a tensor of this whole name."""
        return name not in self.unused and self.prefix + name in self.file.tensors

    def has_shape(self, name: str, *shape: int) -> bool:
        """Whether the tensor of this whole name is of this shape, apart from dimensions of one."""
        return self.has_tensor(name) and _of_size(self.file.tensors[self.prefix + name].shape) == _of_size(shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of `name.weight`. Raises ModelError when it is missing."""
        return self._info(f"{self.prefix}{name}.weight").shape

    def linear(self, name: str, *shape: int) -> Linear:
        """`name.weight` of this shape (out features, in features), and `name.bias` where there is one."""
        weight = self.weight(name, *shape)
        found = [adapter.find(f"{self.prefix}{name}.weight", shape, self.place) for adapter in self.adapters]
        bias = self.optional_vector(f"{name}.bias", *shape[:-1])
        return Linear(weight, bias, tuple(low_rank for low_rank in found if low_rank))

    def weight(self, name: str, *shape: int) -> Weight:
        """`name.weight`."""
        name = f"{self.prefix}{name}.weight"
        self._check(name, shape)
        weight = load_weight(self.file, name, self.place, shape=shape)
        self.loaded(weight.nbytes)
        return weight

    def vector(self, name: str, *shape: int) -> torch.Tensor:
        """A small tensor by its whole name, as float32."""
        self._check(self.prefix + name, shape)
        return load_vector(self.file, self.prefix + name, self.place).view(shape)

    def optional_vector(self, name: str, *shape: int) -> torch.Tensor | None:
        """The same, or None where the file has none."""
        return self.vector(name, *shape) if self.has_tensor(name) else None

    def fail(self, what: str) -> ModelError:
        """The error to raise about this file."""
        return ModelError(f"{self.file.path.name}: {what}.")

    def _info(self, name: str):  # type: ignore[no-untyped-def]
        info = self.file.tensors.get(name)
        if info is None:
            raise self.fail(f"tensor {name!r} is missing")
        return info

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        info = self._info(name)
        if _of_size(info.shape) != _of_size(shape):
            raise self.fail(f"tensor {name!r} has shape {info.shape} where the metadata implies {shape}")


def _of_size(shape: tuple[int, ...]) -> list[int]:
    """The dimensions that count: GGUF leaves out leading ones, some converters add others."""
    return [length for length in shape if length != 1]
