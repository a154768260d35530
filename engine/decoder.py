"""The decoder: what a token passes through from its id to its logits.

Built from an architecture's record and the file's tensors, with nothing in it that assumes one sequence: `forward`
takes a batch of tokens laid flat. The residual stream is float32 and updated in place; each block hands its result on
as `delta`, which the next norm adds, so that the addition costs no pass of its own. Layers may lie on different
devices: the stream moves to the layer's device where it has to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from trichord.batch import Batch
from trichord.cache import KeyValueCache, KeyValueSpec
from trichord.device import Place
from trichord.dispatch import Precision, matmul
from trichord.errors import ModelError
from trichord.gguf_file import GGUFFile
from trichord.model_config import ModelConfig
from trichord.rotary import Rotary
from trichord.weight_format import Weight
from trichord.weights import load_vector, load_weight


@dataclass(frozen=True)
class Linear:
    """A weight and its bias, if the file has one."""

    weight: Weight
    bias: torch.Tensor | None


def project(x: torch.Tensor, linears: Sequence[Linear], precision: Precision) -> list[torch.Tensor]:
    """x (T, K) through several linears that share their input and device: [(T, N), ...]."""
    products = matmul(x, [linear.weight for linear in linears], precision)
    return [y if linear.bias is None else y.add_(linear.bias) for y, linear in zip(products, linears, strict=True)]


@dataclass(frozen=True)
class TensorSource:
    """Loads the tensors of one device, checking each against the shape that the configuration implies."""

    file: GGUFFile
    place: Place
    loaded: Callable[[int], None]

    def linear(self, name: str, out_features: int, in_features: int) -> Linear:
        """`name.weight`, and `name.bias` where there is one."""
        weight = self.weight(f"{name}.weight", out_features, in_features)
        bias = f"{name}.bias"
        return Linear(weight, self.vector(bias, out_features) if bias in self.file.tensors else None)

    def weight(self, name: str, out_features: int, in_features: int) -> Weight:
        """A weight matrix."""
        self._check(name, (out_features, in_features))
        weight = load_weight(self.file, name, self.place)
        self.loaded(weight.nbytes)
        return weight

    def vector(self, name: str, size: int) -> torch.Tensor:
        """A one-dimensional tensor, as float32."""
        self._check(name, (size,))
        return load_vector(self.file, name, self.place)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        info = self.file.tensors.get(name)
        if info is None:
            raise ModelError(f"{self.file.path.name}: tensor {name!r} is missing.")
        if info.shape != shape:
            raise ModelError(
                f"{self.file.path.name}: tensor {name!r} has shape {info.shape} where the metadata implies {shape}."
            )


class Step:
    """What all layers of one device share in one step: the batch and its rotary angles, on that device."""

    def __init__(self, batch: Batch, rotary: Rotary, precision: Precision) -> None:
        self.batch = batch
        self.rotary = rotary
        self.precision = precision

    @cached_property
    def angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (T, R/2) of the batch's positions."""
        return self.rotary.tables(self.batch.positions)


class Attention:
    """Grouped-query attention over the paged cache."""

    def __init__(self, source: TensorSource, config: ModelConfig, prefix: str) -> None:
        self.config = config
        self.operations = source.place.operations
        query, key = config.heads * config.head_size, config.kv_heads * config.head_size
        value = config.kv_heads * config.value_size
        self.inputs = [
            source.linear(f"{prefix}.attn_q", query, config.hidden_size),
            source.linear(f"{prefix}.attn_k", key, config.hidden_size),
            source.linear(f"{prefix}.attn_v", value, config.hidden_size),
        ]
        self.output = source.linear(f"{prefix}.attn_output", config.hidden_size, config.heads * config.value_size)
        self.cache = KeyValueSpec(config.kv_heads, config.head_size, config.value_size)

    def forward(self, x: torch.Tensor, step: Step, cache: KeyValueCache) -> torch.Tensor:
        """x (T, hidden) -> (T, hidden); writes the batch's keys and values into the cache."""
        config, batch = self.config, step.batch
        q, k, v = project(x, self.inputs, step.precision)
        q = q.view(-1, config.heads, config.head_size)
        k = k.view(-1, config.kv_heads, config.head_size)
        v = v.view(-1, config.kv_heads, config.value_size)
        cos, sin = step.angles
        interleaved = config.architecture.interleaved_rotary
        self.operations.rotary_and_cache(q, k, v, cos, sin, cache.keys, cache.values, batch.slots, interleaved)
        mixed = self.operations.attention(
            q,
            cache.keys,
            cache.values,
            batch.page_tables,
            batch.query_starts,
            batch.context_lengths,
            batch.max_query,
            config.head_size**-0.5,
            step.precision,
        )
        return project(mixed.view(len(mixed), -1), [self.output], step.precision)[0]


class FeedForward:
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, source: TensorSource, config: ModelConfig, prefix: str) -> None:
        name = f"{prefix}.ffn_up.weight"
        if name not in source.file.tensors:
            raise ModelError(f"{source.file.path.name}: tensor {name!r} is missing.")
        width = source.file.tensors[name].shape[0]
        self.operations = source.place.operations
        self.inputs = [source.linear(f"{prefix}.ffn_{side}", width, config.hidden_size) for side in ("gate", "up")]
        self.output = source.linear(f"{prefix}.ffn_down", config.hidden_size, width)

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """x (T, hidden) -> (T, hidden)."""
        gate, up = project(x, self.inputs, step.precision)
        return project(self.operations.activate(gate, up, "silu"), [self.output], step.precision)[0]


class DecoderLayer:
    """Attention and feed-forward, each behind its norm."""

    def __init__(self, source: TensorSource, config: ModelConfig, index: int) -> None:
        prefix = f"blk.{index}"
        self.place = source.place
        self.epsilon = config.norm_epsilon
        self.attention_gain = source.vector(f"{prefix}.attn_norm.weight", config.hidden_size)
        self.attention = Attention(source, config, prefix)
        self.feed_forward_gain = source.vector(f"{prefix}.ffn_norm.weight", config.hidden_size)
        self.feed_forward = FeedForward(source, config, prefix)

    def forward(
        self, residual: torch.Tensor, delta: torch.Tensor | None, step: Step, cache: KeyValueCache
    ) -> torch.Tensor:
        """Adds `delta` and the attention to the residual (T, hidden) in place; returns the feed-forward's delta."""
        norm = self.place.operations.norm
        x = norm(residual, self.attention_gain, self.epsilon, delta)
        delta = self.attention.forward(x, step, cache)
        x = norm(residual, self.feed_forward_gain, self.epsilon, delta)
        return self.feed_forward.forward(x, step)


class Decoder:
    """A whole model. `places` gives each layer its device; the embedding and the output lie on `outer`.

    `loaded` is called with the bytes of each weight as it arrives; `weight_bytes` is their sum. Raises ModelError for a
    tensor that is missing or does not fit the metadata, DeviceError when memory runs out.
    """

    def __init__(
        self,
        file: GGUFFile,
        config: ModelConfig,
        places: Sequence[Place],
        outer: Place,
        loaded: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.config = config
        self.outer = outer
        self.weight_bytes = 0

        def arrived(nbytes: int) -> None:
            self.weight_bytes += nbytes
            loaded(nbytes)

        source = TensorSource(file, outer, arrived)
        self.vocabulary = _vocabulary(file)
        self.embedding = source.weight("token_embd.weight", self.vocabulary, config.hidden_size)
        self.layers = [
            DecoderLayer(TensorSource(file, place, arrived), config, index) for index, place in enumerate(places)
        ]
        self.output_gain = source.vector("output_norm.weight", config.hidden_size)
        if "output.weight" in file.tensors:
            self.output = source.linear("output", self.vocabulary, config.hidden_size)
        else:
            self.output = Linear(self.embedding, None)
        self.rotary = Rotary(config.rotary, _rotary_divisors(file, config))

    def forward(self, batch: Batch, caches: Sequence[KeyValueCache], precision: Precision) -> torch.Tensor:
        """The logits (R, vocabulary) float32 of the batch's `logit_rows`; every layer's cache takes the new tokens."""
        steps: dict[torch.device, Step] = {}
        outer = self._step(steps, batch, self.outer, precision)
        # Kernels start on the current GPU, which need not be the one that a layer lies on.
        with torch.cuda.device_of(outer.batch.token_ids):
            residual = self.outer.operations.embedding(outer.batch.token_ids, self.embedding)
        delta = None
        for layer, cache in zip(self.layers, caches, strict=True):
            step = self._step(steps, batch, layer.place, precision)
            residual, delta = _moved(residual, delta, layer.place.device)
            with torch.cuda.device_of(residual):
                delta = layer.forward(residual, delta, step, cache)
        residual, delta = _moved(residual, delta, self.outer.device)
        rows = outer.batch.logit_rows
        delta = None if delta is None else delta[rows]
        with torch.cuda.device_of(residual):
            x = self.outer.operations.norm(residual[rows], self.output_gain, self.config.norm_epsilon, delta)
            return project(x, [self.output], precision)[0]

    def _step(self, steps: dict[torch.device, Step], batch: Batch, place: Place, precision: Precision) -> Step:
        if place.device not in steps:
            steps[place.device] = Step(batch.to(place.device), self.rotary, precision)
        return steps[place.device]


def _moved(
    residual: torch.Tensor, delta: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The stream on `device`; its pending delta is added first, so that only one tensor crosses."""
    if residual.device == device:
        return residual, delta
    return (residual if delta is None else residual.add_(delta)).to(device), None


def _vocabulary(file: GGUFFile) -> int:
    info = file.tensors.get("token_embd.weight")
    if info is None or len(info.shape) != 2:
        raise ModelError(
            f"{file.path.name}: no matrix 'token_embd.weight': the file holds no model, only its metadata."
        )
    return info.shape[0]


def _rotary_divisors(file: GGUFFile, config: ModelConfig) -> torch.Tensor | None:
    """The factors that stretch each frequency: one tensor (Llama 3.1), or one for long contexts and one for short."""
    long = config.context_length > config.rotary.original_context
    for name in ("rope_freqs.weight", f"rope_factors_{'long' if long else 'short'}.weight"):
        if name in file.tensors:
            divisors = load_vector(file, name)
            if divisors.shape != (config.rotary.dimensions // 2,):
                raise ModelError(
                    f"{file.path.name}: tensor {name!r} has shape {tuple(divisors.shape)} "
                    f"where {config.rotary.dimensions // 2} pairs turn."
                )
            return divisors
    return None
