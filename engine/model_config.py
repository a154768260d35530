"""The model's dimensions, read from the metadata keys that its architecture uses and checked for sense."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trichord.architectures import Architecture, find_architecture
from trichord.errors import ModelError
from trichord.gguf_file import GGUFFile
from trichord.rotary import RotaryConfig

_SCALINGS = ("none", "linear", "yarn", "longrope")


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of a decoder. `head_size` and `value_size` are the widths of a key and of a value head."""

    architecture: Architecture
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    norm_epsilon: float
    context_length: int
    rotary: RotaryConfig

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> ModelConfig:
        """Reads the configuration. Raises GGUFError for a missing or mistyped key, ModelError for an impossible one."""
        return _Reader(file).config()


class _Reader:
    """Metadata under the architecture's prefix. A value of 0 means unset, as in llama.cpp."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture = find_architecture(file.require("general.architecture", str))

    def config(self) -> ModelConfig:
        layers = self.positive("block_count")
        if layers > len(self.file.tensors):
            self.fail(f"the metadata promises {layers} layers, but the file has {len(self.file.tensors)} tensors")
        hidden_size = self.positive("embedding_length")
        context_length = self.positive("context_length")
        heads = self.per_layer("attention.head_count", layers)
        kv_heads = self.per_layer("attention.head_count_kv", layers, default=heads)
        if heads % kv_heads:
            self.fail(f"{heads} query heads cannot share {kv_heads} key-value heads")
        if self.number("expert_count"):
            self.fail("mixtures of experts are not supported yet")
        head_size = self.number("attention.key_length") or self.divided(hidden_size, heads)
        epsilon = self.file.require(self.key("attention.layer_norm_rms_epsilon"), float)
        if not 0 < epsilon < 1:
            self.fail(f"a norm epsilon of {epsilon} makes no sense")
        return ModelConfig(
            architecture=self.architecture,
            layers=layers,
            hidden_size=hidden_size,
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            value_size=self.number("attention.value_length") or head_size,
            norm_epsilon=epsilon,
            context_length=context_length,
            rotary=self.rotary(head_size, context_length),
        )

    def rotary(self, head_size: int, context_length: int) -> RotaryConfig:
        dimensions = self.number("rope.dimension_count") or head_size
        if dimensions > head_size or dimensions % 2:
            self.fail(f"{dimensions} rotary dimensions do not fit a head of {head_size}")
        # Files that name a factor but no kind mean linear interpolation.
        scaling = self.file.get(self.key("rope.scaling.type"), str) or "linear"
        if scaling not in _SCALINGS:
            self.fail(f"rotary scaling {scaling!r} is not one of {', '.join(_SCALINGS)}")
        return RotaryConfig(
            dimensions=dimensions,
            base=self.real("rope.freq_base") or 10000.0,
            scaling=scaling,
            factor=self.real("rope.scaling.factor") or self.real("rope.scale_linear") or 1.0,
            original_context=self.number("rope.scaling.original_context_length") or context_length,
            attention_factor=self.real("rope.scaling.attn_factor") or 1.0,
            beta_fast=self.real("rope.scaling.yarn_beta_fast") or 32.0,
            beta_slow=self.real("rope.scaling.yarn_beta_slow") or 1.0,
        )

    def key(self, name: str) -> str:
        return f"{self.architecture.name}.{name}"

    def number(self, name: str) -> int:
        value = self.file.get(self.key(name), int, 0)
        if not 0 <= value < 2**31:
            self.fail(f"{self.key(name)} is {value}")
        return value

    def positive(self, name: str) -> int:
        self.file.require(self.key(name), int)
        return self.number(name) or self.fail(f"{self.key(name)} is 0")

    def real(self, name: str) -> float:
        value = self.file.get(self.key(name), float, 0.0)
        if not (math.isfinite(value) and value >= 0):
            self.fail(f"{self.key(name)} is {value}")
        return value

    def per_layer(self, name: str, layers: int, default: int | None = None) -> int:
        """One number, or an array of one number a layer, which must be all the same."""
        value = self.file.metadata.get(self.key(name), default)
        if hasattr(value, "__len__") and not isinstance(value, str):
            values = {int(v) for v in value}
            if len(value) < layers or len(values) != 1:
                self.fail(f"{self.key(name)} differs between layers, which {self.architecture.name} does not support")
            value = values.pop()
        elif value is not default:
            value = self.positive(name)
        elif value is None:
            self.file.require(self.key(name), int)
        return int(value)

    def divided(self, hidden_size: int, heads: int) -> int:
        size, rest = divmod(hidden_size, heads)
        return size if not rest else self.fail(f"an embedding of {hidden_size} does not divide into {heads} heads")

    def fail(self, what: str) -> int:
        raise ModelError(f"{self.file.path.name}: {what}.")
