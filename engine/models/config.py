"""The model's dimensions, layer by layer, read from the metadata keys that its architecture uses, checked for sense."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from trichord.errors import ModelError
from trichord.gguf_file import GGUFFile
from trichord.models.architectures import Architecture, find_architecture
from trichord.rotary import RotaryConfig

_SCALINGS = ("none", "linear", "yarn", "longrope")
_MOST_EXPERTS = 4096


@dataclass(frozen=True)
class LayerConfig:
    """One layer's attention: heads of queries and of keys and values, their widths, its window (0: none), rotation."""

    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    window: int
    rotary: RotaryConfig | None


@dataclass(frozen=True)
class ExpertConfig:
    """How many experts there are and how many a token takes, in how many groups; the scale of their weights."""

    count: int
    used: int
    groups: int
    groups_used: int
    normalize: bool
    scale: float
    gating: str


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of a decoder."""

    architecture: Architecture
    hidden_size: int
    norm_epsilon: float
    context_length: int
    layers: tuple[LayerConfig, ...]
    experts: ExpertConfig | None
    parallel: bool
    attention_scale: float
    """0: one over the root of the head's size."""
    attention_soft_cap: float
    query_key_clamp: float
    alibi_bias: float
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    logit_soft_cap: float

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> ModelConfig:
        """Reads the configuration. Raises GGUFError for a missing or mistyped key, ModelError for an impossible one."""
        return _Config(Metadata(file)).read()


class Metadata:
    """Checked access to the keys under the architecture's prefix. A value of 0 means unset, as in llama.cpp."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture = find_architecture(file.require("general.architecture", str))
        for refinement in self.architecture.refined:
            if self._has(refinement.key, refinement.value):
                self.architecture = replace(self.architecture, **refinement.changes)

    def key(self, name: str) -> str:
        """The whole key of a name."""
        return f"{self.architecture.name}.{name}"

    def number(self, name: str, default: int = 0) -> int:
        """A count."""
        value = self.file.get(self.key(name), int, 0)
        if not 0 <= value < 2**31:
            self.fail(f"{self.key(name)} is {value}")
        return value or default

    def positive(self, name: str) -> int:
        """A count that must be there."""
        self.file.require(self.key(name), int)
        return self.number(name) or self.fail(f"{self.key(name)} is 0")

    def real(self, name: str, default: float = 0.0) -> float:
        """A finite number of at least 0."""
        value = self.file.get(self.key(name), float, 0.0)
        if not (math.isfinite(value) and value >= 0):
            self.fail(f"{self.key(name)} is {value}")
        return value or default

    def flag(self, name: str) -> bool:
        """A switch."""
        return bool(self.file.get(self.key(name), bool, False))

    def text(self, name: str) -> str:
        """A word, or nothing."""
        return self.file.get(self.key(name), str) or ""

    def per_layer(self, name: str, layers: int, default: int | None = None) -> list[int]:
        """A number for each layer: an array of them, or one for all. Raises GGUFError where there is no default."""
        value = self.file.metadata.get(self.key(name))
        if value is None and default is None:
            self.file.require(self.key(name), int)
        if value is None:
            return [default or 0] * layers
        if not hasattr(value, "__len__"):
            return [self.number(name)] * layers
        if isinstance(value, str) or len(value) < layers:
            self.fail(f"{self.key(name)} should hold a number for each of {layers} layers")
        numbers = [int(number) for number in value[:layers]]
        if not all(0 <= number < 2**31 for number in numbers):
            self.fail(f"{self.key(name)} holds {min(numbers)} to {max(numbers)}")
        return numbers

    def _has(self, name: str, value: int | None) -> bool:
        found = self.file.metadata.get(self.key(name), 0)
        if hasattr(found, "__len__"):
            return bool(len(found)) and value is None and any(found)
        return bool(found) if value is None else found == value

    def fail(self, what: str) -> int:
        """Raises ModelError."""
        raise ModelError(f"{self.file.path.name}: {what}.")


class _Config:
    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata
        self.architecture = metadata.architecture

    def read(self) -> ModelConfig:
        metadata, architecture = self.metadata, self.architecture
        layers = metadata.positive("block_count")
        if layers > len(metadata.file.tensors):
            metadata.fail(
                f"the metadata promises {layers} layers, but the file has {len(metadata.file.tensors)} tensors"
            )
        layers -= metadata.number("nextn_predict_layers")
        if layers < 1:
            metadata.fail("all layers predict tokens after the next one: none are left")
        self.hidden_size = metadata.positive("embedding_length")
        self.context_length = metadata.positive("context_length")
        return ModelConfig(
            architecture=architecture,
            hidden_size=self.hidden_size,
            norm_epsilon=self.epsilon(),
            context_length=self.context_length,
            layers=self.layers(layers),
            experts=self.experts(),
            parallel=self.parallel(),
            attention_scale=metadata.real("attention.scale") if architecture.attention_scale == "metadata" else 0.0,
            attention_soft_cap=metadata.real("attn_logit_softcapping", 50.0) if architecture.soft_caps else 0.0,
            query_key_clamp=metadata.real("attention.clamp_kqv") if architecture.clamped else 0.0,
            alibi_bias=metadata.real("attention.max_alibi_bias", 8.0) if architecture.alibi else 0.0,
            embedding_scale=self.embedding_scale(),
            residual_scale=(metadata.real("residual_scale") or 1.0) if architecture.residual_scale else 1.0,
            logit_scale=self.logit_scale(),
            logit_soft_cap=metadata.real("final_logit_softcapping", 30.0) if architecture.soft_caps else 0.0,
        )

    def epsilon(self) -> float:
        keys = [self.metadata.key(f"attention.layer_norm_{kind}") for kind in ("rms_epsilon", "epsilon")]
        if self.architecture.norm == "layer":
            keys.reverse()
        epsilon = self.metadata.file.get(keys[0], float, 0.0) or self.metadata.file.get(keys[1], float, 0.0)
        if not any(key in self.metadata.file.metadata for key in keys):
            self.metadata.file.require(keys[0], float)
        if not 0 <= epsilon < 1:
            self.metadata.fail(f"a norm epsilon of {epsilon} makes no sense")
        return epsilon

    def layers(self, layers: int) -> tuple[LayerConfig, ...]:
        metadata = self.metadata
        heads = metadata.per_layer("attention.head_count", layers)
        kv_heads = metadata.per_layer("attention.head_count_kv", layers, default=max(heads))
        windows = self.windows(layers)
        full, windowed = self.head_sizes(max(heads), ""), self.head_sizes(max(heads), "_swa")
        rotaries = [self.rotary(full[0], ""), self.rotary(windowed[0], "_swa")]
        configs = []
        for index in range(layers):
            window = windows[index]
            if kv_heads[index] and heads[index] % kv_heads[index]:
                metadata.fail(f"{heads[index]} query heads cannot share {kv_heads[index]} key-value heads")
            head_size, value_size = windowed if window else full
            rotary = rotaries[bool(window)] if self.rotates(index, window) else None
            configs.append(LayerConfig(heads[index], kv_heads[index], head_size, value_size, window, rotary))
        return tuple(configs)

    def windows(self, layers: int) -> list[int]:
        """The window of each layer. The metadata's pattern is a period or a flag for each layer."""
        size = self.metadata.number("attention.sliding_window") if self.architecture.window_every else 0
        key = self.metadata.key("attention.sliding_window_pattern")
        every = self.metadata.file.metadata.get(key, self.architecture.window_every)
        if hasattr(every, "__len__") and not isinstance(every, str):
            return [size * bool(flag) for flag in self.metadata.per_layer("attention.sliding_window_pattern", layers)]
        if every == 0:
            return [0] * layers
        every = self.metadata.number("attention.sliding_window_pattern", self.architecture.window_every)
        return (
            [size if every == 1 or index % every < every - 1 else 0 for index in range(layers)]
            if every
            else [0] * layers
        )

    def head_sizes(self, heads: int, suffix: str) -> tuple[int, int]:
        """Widths of a key and of a value."""
        metadata = self.metadata
        plain = metadata.number("attention.key_length")
        if not plain and heads:
            plain, rest = divmod(self.hidden_size, heads)
            if rest:
                metadata.fail(f"an embedding of {self.hidden_size} does not divide into {heads} heads")
        size = metadata.number(f"attention.key_length{suffix}", plain)
        return size, metadata.number(f"attention.value_length{suffix}", metadata.number("attention.value_length", size))

    def rotates(self, index: int, window: int) -> bool:
        unrotated = self.architecture.unrotated
        if self.architecture.rotary == "none":
            return False
        if unrotated == "full_attention":
            return bool(window) or not any(self.windows(index + 1))
        return unrotated == "never" or bool((index + 1) % unrotated)

    def rotary(self, head_size: int, suffix: str) -> RotaryConfig | None:
        metadata = self.metadata
        if not head_size:
            return None
        dimensions = metadata.number(f"rope.dimension_count{suffix}") or metadata.number("rope.dimension_count")
        dimensions = dimensions or head_size
        if self.architecture.rotary != "none" and (dimensions > head_size or dimensions % 2):
            metadata.fail(f"{dimensions} rotary dimensions do not fit a head of {head_size}")
        # Files that name a factor but no kind mean linear interpolation.
        scaling = metadata.text("rope.scaling.type") or "linear"
        if scaling not in _SCALINGS:
            metadata.fail(f"rotary scaling {scaling!r} is not one of {', '.join(_SCALINGS)}")
        config = RotaryConfig(
            dimensions=dimensions,
            base=metadata.real("rope.freq_base") or 10000.0,
            scaling=scaling,
            factor=metadata.real("rope.scaling.factor") or metadata.real("rope.scale_linear") or 1.0,
            original_context=metadata.number("rope.scaling.original_context_length") or self.context_length,
            attention_factor=metadata.real("rope.scaling.attn_factor") or 1.0,
            beta_fast=metadata.real("rope.scaling.yarn_beta_fast") or 32.0,
            beta_slow=metadata.real("rope.scaling.yarn_beta_slow") or 1.0,
        )
        if suffix and self.architecture.window_base is not None:
            base = metadata.real("rope.freq_base_swa", self.architecture.window_base or config.base)
            config = replace(config, base=base, scaling="none", factor=1.0)
        return config

    def experts(self) -> ExpertConfig | None:
        metadata, routing = self.metadata, self.architecture.experts
        count = metadata.number("expert_count")
        if not count:
            return None
        used = metadata.positive("expert_used_count")
        groups = metadata.number("expert_group_count", 1) if routing.grouped else 1
        groups_used = metadata.number("expert_group_used_count", 1) if groups > 1 else 1
        if count > _MOST_EXPERTS or used > count or count % groups or groups_used > groups:
            metadata.fail(f"{used} of {count} experts in {groups_used} of {groups} groups cannot be chosen")
        gating = routing.gating
        if gating is True:
            gating = {0: "softmax", 1: "softmax", 2: "sigmoid", 3: "softmax_of_chosen"}.get(
                metadata.number("expert_gating_func")
            )
            if gating is None:
                metadata.fail(f"expert gating {metadata.number('expert_gating_func')} is unknown")
        normalize = metadata.flag("expert_weights_norm") if routing.normalize is None else routing.normalize
        scale = metadata.real("expert_weights_scale", 1.0) if routing.scaled else 1.0
        return ExpertConfig(count, used, groups, groups_used, normalize, scale, gating)

    def parallel(self) -> bool:
        parallel = self.architecture.parallel
        return self.metadata.flag("use_parallel_residual") if parallel == "metadata" else parallel is True

    def embedding_scale(self) -> float:
        scale = self.architecture.embedding_scale
        if scale == "sqrt_width":
            return math.sqrt(self.hidden_size)
        if scale == "metadata":
            return self.metadata.real("embedding_scale", 1.0)
        return scale or 1.0

    def logit_scale(self) -> float:
        how = self.architecture.logit_scale
        scale = self.metadata.real("logit_scale", 1.0) if how else 1.0
        return 1.0 / scale if how == "divide" else scale
