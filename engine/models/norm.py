"""Norms of the stream and of heads: RMS or layer norm, with the gain and bias that the file has."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trichord.dispatch import Operations, Precision, Prepared
from trichord.models.config import ModelConfig
from trichord.models.linear import TensorSource
from trichord.models.record import BARE


@dataclass(frozen=True)
class Norm:
    """A norm over the last dimension of rows. gain and bias (K,), or (M, K) where row t takes line t % M."""

    operations: Operations
    gain: torch.Tensor | None
    bias: torch.Tensor | None
    epsilon: float
    centered: bool

    @classmethod
    def of(
        cls,
        source: TensorSource,
        names: tuple[str, ...],
        config: ModelConfig,
        epsilon: float | None = None,
        *,
        size: int = 0,
    ) -> Norm | None:
        """The norm of `size` elements (0: of the stream) by the first of these names that the file has.

        None for no names. Raises ModelError.
        """
        if not names:
            return None
        operations, centered = source.place.operations, config.architecture.norm == "layer"
        epsilon = config.norm_epsilon if epsilon is None else epsilon
        if names == BARE:
            return cls(operations, None, None, epsilon, centered)
        # A few converters leave out the ".weight".
        gains = [f"{name}{end}" for name in names for end in (".weight", "")]
        name = next((name for name in gains if source.has_tensor(name)), gains[0])
        size = size or config.hidden_size
        gain = source.vector(name, size)
        bias = source.optional_vector(f"{name.removesuffix('.weight')}.bias", size)
        return cls(operations, gain, bias, epsilon, centered)

    @classmethod
    def of_heads(cls, source: TensorSource, name: str, heads: int, size: int, config: ModelConfig) -> Norm | None:
        """The norm of queries or keys, if the file has one: of each head (one gain, or one a head) or of all."""
        centered = config.architecture.head_norm == "layer"
        if not source.has(name):
            bare = config.architecture.bare_head_norm
            return cls(source.place.operations, None, None, config.norm_epsilon, centered) if bare else None
        shape = source.shape(name)
        if shape not in ((size,), (heads, size), (heads * size,), (heads, 1)):
            raise source.fail(
                f"tensor {source.prefix + name + '.weight'!r} has shape {shape} for {heads} heads of {size}"
            )
        bias = source.optional_vector(f"{name}.bias", *shape)
        gain = source.vector(f"{name}.weight", *shape)
        if shape == (heads, 1):
            gain = gain.repeat(1, size)
        return cls(source.place.operations, gain, bias, config.norm_epsilon, centered)

    def __call__(
        self, x: torch.Tensor, delta: torch.Tensor | None = None, *, prepare: Precision | None = None
    ) -> torch.Tensor | Prepared:
        """x (T, K) += delta, in place; returns its normalised rows, on request for products alone to read."""
        return self.operations.norm(
            x, self.gain, self.epsilon, delta, bias=self.bias, centered=self.centered, prepare=prepare
        )

    def of_rows(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, H, D) normalised head by head, or over runs as wide as the gain, of the same shape."""
        width = x.shape[-1] if self.gain is None else self.gain.shape[-1]
        return self(x.reshape(-1, width)).view(x.shape)
