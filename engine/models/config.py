"""The model's dimensions, layer by layer, read from the metadata keys that its architecture uses, checked for sense."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from trichord.errors import ModelError
from trichord.gguf_file import GGUFFile
from trichord.models.architectures import find_architecture
from trichord.models.record import Architecture, Temperature
from trichord.rotary import RotaryConfig

_UNSTRETCHED: dict[str, Any] = {"scaling": "none", "factor": 1.0, "attention_factor": 1.0}
_SCALINGS = ("none", "linear", "yarn", "longrope")
_GATINGS = ("", "softmax", "sigmoid", "softmax_of_chosen")
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
    expert_clamp: float
    depth: float
    """Where among the layers it lies, from 0 to 1."""
    feed_forward: bool
    """Whether a feed-forward network belongs to it, unless its architecture says otherwise."""


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
    adjugate_group: int
    """How many experts share an adjugate expert, where the file has such."""
    adjugate_scale: float


@dataclass(frozen=True)
class StateSpaceConfig:
    """Recurrent blocks: channels of the state's input, columns of a head's state, heads, groups that share b and c."""

    inner_size: int
    state_size: int
    heads: int
    groups: int
    normed: bool
    """Whether what depends on the input is normalised, without a gain."""


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of a decoder."""

    architecture: Architecture
    hidden_size: int
    norm_epsilon: float
    context_length: int
    layers: tuple[LayerConfig, ...]
    experts: ExpertConfig | None
    state_space: StateSpaceConfig
    recurrence: tuple[int, int, int]
    """Layers of a stack, cycles, and passes through the low stack in each, of a recurrence in depth; else zeros."""
    parallel: bool
    attention_scale: float
    """0: one over the root of the head's size."""
    attention_soft_cap: float
    query_key_clamp: float
    alibi_bias: float
    value_scale: float
    """What the attention's output is multiplied by."""
    temperature: Temperature | None
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
        try:
            numbers = [int(number) for number in value[:layers]]
        except (TypeError, ValueError, OverflowError):
            self.fail(f"{self.key(name)} holds what are no numbers")
        if not all(0 <= number < 2**31 for number in numbers):
            self.fail(f"{self.key(name)} holds {min(numbers)} to {max(numbers)}")
        return numbers

    def _has(self, name: str, value: int | str | None) -> bool:
        found = self.file.metadata.get(self.key(name))
        if hasattr(found, "__len__") and not isinstance(found, str):
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
        if any(name.startswith(f"blk.{layers}.") for name in metadata.file.tensors):
            metadata.fail(f"the metadata counts {layers} layers, but the file has tensors of a further one")
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
            state_space=self.state_space(),
            recurrence=self.recurrence(),
            parallel=self.parallel(),
            attention_scale=self.attention_scale(),
            attention_soft_cap=self.or_else("attn_logit_softcapping", architecture.attention_soft_cap),
            query_key_clamp=metadata.real("attention.clamp_kqv") if architecture.clamped else 0.0,
            alibi_bias=self.or_else("attention.max_alibi_bias", architecture.alibi),
            value_scale=metadata.real("attention.value_scale", 1.0),
            temperature=self.temperature(),
            embedding_scale=self.embedding_scale(),
            residual_scale=self.or_else("residual_scale", architecture.residual_scale, math.sqrt(layers)) or 1.0,
            logit_scale=self.logit_scale(),
            logit_soft_cap=self.or_else("final_logit_softcapping", architecture.logit_soft_cap),
        )

    def or_else(self, name: str, default: float | None, divisor: float = 1.0) -> float:
        """The metadata's number, or the default, divided; 0 without a default: the architecture has no such thing."""
        return 0.0 if default is None else self.metadata.real(name, default / divisor)

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
        if not max(heads) and not self.architecture.recurrent:
            metadata.fail(f"{metadata.key('attention.head_count')} is 0")
        kv_heads = metadata.per_layer("attention.head_count_kv", layers, default=max(heads))
        widths = metadata.per_layer("feed_forward_length", layers, default=1)
        turning = metadata.per_layer("attention.rope_pattern", layers, default=1)
        windows, clamps = self.windows(layers), self.expert_clamps(layers)
        # What a head of latent attention reads is told apart from what its cache holds.
        full, windowed = self.head_sizes(max(heads), "_mla"), self.head_sizes(max(heads), "_swa")
        rotaries = [self.rotary(full[0], ""), self.rotary(windowed[0], "_swa")]
        configs = []
        for index in range(layers):
            window = windows[index]
            if kv_heads[index] and heads[index] % kv_heads[index]:
                metadata.fail(f"{heads[index]} query heads cannot share {kv_heads[index]} key-value heads")
            head_size, value_size = windowed if window else full
            rotary = rotaries[bool(window)] if turning[index] and self.rotates(index, windows) else None
            configs.append(
                LayerConfig(
                    heads[index],
                    kv_heads[index],
                    head_size,
                    value_size,
                    window,
                    rotary,
                    clamps[index],
                    index / max(1, layers - 1),
                    bool(widths[index]),
                )
            )
        return tuple(configs)

    def windows(self, layers: int) -> list[int]:
        """The window of each layer. The metadata's pattern is a period or a flag for each layer."""
        metadata, architecture = self.metadata, self.architecture
        if not architecture.window_every:
            return [0] * layers
        size, pattern = metadata.number("attention.sliding_window"), "attention.sliding_window_pattern"
        if metadata.key("attention.sliding_window") not in metadata.file.metadata:
            size = architecture.window_size
        found = metadata.file.metadata.get(metadata.key(pattern), architecture.window_every)
        if hasattr(found, "__len__") and not isinstance(found, str):
            return [size * bool(flag) for flag in metadata.per_layer(pattern, layers)]
        every = metadata.number(pattern, architecture.window_every) if found else 0
        full = 0 if architecture.full_attention_first else every - 1
        return [size if every == 1 or (every and index % every != full) else 0 for index in range(layers)]

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

    def rotates(self, index: int, windows: list[int]) -> bool:
        architecture = self.architecture
        if architecture.rotary == "none":
            return False
        if architecture.dense_rotated and index < self.metadata.number("leading_dense_block_count"):
            return True
        if architecture.unrotated == "full_attention":
            return bool(windows[index]) or not any(windows)
        if architecture.window_every and not any(windows):
            return True
        return architecture.unrotated == "never" or bool((index + 1) % architecture.unrotated)

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
            log_multiplier=metadata.real("rope.scaling.yarn_log_multiplier") if scaling == "yarn" else 0.0,
        )
        if suffix:
            base = metadata.real("rope.freq_base_swa", self.architecture.window_base or config.base)
            unstretched = self.architecture.window_base is not None
            config = replace(config, base=base, **(_UNSTRETCHED if unstretched else {}))
        return config

    def attention_scale(self) -> float:
        how = self.architecture.attention_scale
        if how == "root_share":
            return (self.hidden_size / max(1, self.metadata.number("attention.head_count"))) ** -0.5
        keys = ("attention.scale", "attention.output_scale") if how == "metadata" else ()
        return next((scale for key in keys if (scale := self.metadata.real(key))), 0.0)

    def expert_clamps(self, layers: int) -> list[float]:
        """The bound of the experts' activations in each layer; 0: none."""
        default, key = self.architecture.experts.clamp, self.metadata.key("swiglu_clamp_exp")
        value = self.metadata.file.metadata.get(key, default)
        if default is None or value is None:
            return [0.0] * layers
        clamps = [float(clamp) for clamp in value] if hasattr(value, "__len__") else [float(value)] * layers
        if len(clamps) < layers or not all(math.isfinite(clamp) for clamp in clamps):
            self.metadata.fail(f"{key} should hold a number for each of {layers} layers")
        return clamps

    def temperature(self) -> Temperature | None:
        temperature = self.architecture.temperature
        if temperature is None:
            return None
        metadata = self.metadata
        original = metadata.number("rope.scaling.original_context_length") or self.context_length
        scale = metadata.real("attention.temperature_scale", temperature.scale)
        length = metadata.number("attention.temperature_length", temperature.length or original)
        return replace(temperature, scale=scale, length=length) if scale else None

    def experts(self) -> ExpertConfig | None:
        metadata, routing = self.metadata, self.architecture.experts
        count = metadata.number("expert_count")
        if not count:
            return None
        used = metadata.positive("expert_used_count")
        groups = metadata.number("expert_group_count", 1)
        groups_used = metadata.number("expert_group_used_count", 1) if groups > 1 else 1
        if count > _MOST_EXPERTS or used > count or count % groups or groups_used > groups:
            metadata.fail(f"{used} of {count} experts in {groups_used} of {groups} groups cannot be chosen")
        gating: str = routing.gating
        number = metadata.number("expert_gating_func") if routing.gating_told else 0
        if number >= len(_GATINGS):
            metadata.fail(f"expert gating {number} is unknown")
        if number:
            gating = _GATINGS[number]
        normalize = metadata.flag("expert_weights_norm") if routing.normalize is None else routing.normalize
        scale = metadata.real("expert_weights_scale", 1.0) if routing.scaled else 1.0
        adjugate = metadata.number("experts_per_group"), metadata.real("expert_group_scale", 0.05)
        return ExpertConfig(count, used, groups, groups_used, normalize, scale, gating, *adjugate)

    def state_space(self) -> StateSpaceConfig:
        metadata = self.metadata
        sizes = (metadata.number(f"ssm.{name}") for name in ("inner_size", "state_size"))
        heads, groups = metadata.number("ssm.time_step_rank", 1), metadata.number("ssm.group_count", 1)
        return StateSpaceConfig(*sizes, heads, groups, metadata.flag("ssm.dt_b_c_rms"))

    def recurrence(self) -> tuple[int, int, int]:
        metadata = self.metadata
        if metadata.flag("hrm.prefix_lm"):
            metadata.fail("prompts whose tokens attend to later ones (hrm.prefix_lm) are not supported")
        return tuple(metadata.number(f"hrm.{name}") for name in ("layers_per_stack", "h_cycles", "l_cycles"))

    def parallel(self) -> bool:
        parallel = self.architecture.parallel
        return self.metadata.flag("use_parallel_residual") if parallel == "metadata" else parallel is True

    def embedding_scale(self) -> float:
        scale = self.architecture.embedding_scale
        default = math.sqrt(self.hidden_size) if scale == "sqrt_width" else scale
        return self.or_else("embedding_scale", default) or 1.0

    def logit_scale(self) -> float:
        architecture = self.architecture
        scale = self.metadata.real("logit_scale") if architecture.logit_scale else 0.0
        if scale:
            return 1.0 / scale if architecture.logit_scale == "divide" else scale
        width = architecture.default_logit_width
        return width / self.hidden_size if width else architecture.default_logit_scale
