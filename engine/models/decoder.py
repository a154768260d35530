"""The decoder: what a token passes through from its id to its logits.

Built from an architecture's record and the file's tensors, with nothing in it that assumes one sequence: `forward`
takes a batch of tokens laid flat. The residual stream is float32. Layers may lie on different devices: the stream moves
to the layer's device where it has to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from trichord.batch import Batch
from trichord.cache import Cache, StateCache, StateSpec
from trichord.device import Place
from trichord.dispatch import Precision
from trichord.errors import ModelError
from trichord.gguf_file import GGUFFile
from trichord.models.config import ModelConfig
from trichord.models.layer import DecoderLayer, enter
from trichord.models.linear import Linear, TensorSource, project
from trichord.models.lora import Adapter, check_all_used
from trichord.models.norm import Norm
from trichord.models.recurrence import Recurrence, Stream
from trichord.models.step import Step
from trichord.rotary import Rotary, RotaryConfig


class Decoder:
    """A whole model. `places` gives each layer its device; the embedding and the output lie on `outer`, the matrices of
    experts, if they are to lie apart from their layers, on `expert_place`.

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
        adapters: Sequence[Adapter] = (),
        expert_place: Place | None = None,
    ) -> None:
        self.config = config
        self.outer = outer
        self.place = outer if {*places, expert_place or outer} == {outer} else None
        """Where the whole model lies; None where it is spread over devices."""
        self.weight_bytes = 0

        def arrived(nbytes: int) -> None:
            self.weight_bytes += nbytes
            loaded(nbytes)

        source = TensorSource(file, outer, arrived, config.architecture.unused, tuple(adapters), "", expert_place)
        self.vocabulary = _vocabulary(file)
        self.embedding = source.weight("token_embd", self.vocabulary, config.hidden_size)
        learned = source.has("position_embd") and config.architecture.learned_positions
        self.positions = source.weight("position_embd", *source.shape("position_embd")) if learned else None
        types = (
            source.vector("token_types.weight", *source.shape("token_types"))
            if config.architecture.token_types
            else None
        )
        self.token_type = None if types is None else types[0]
        self.embedding_norm = Norm.of(source, config.architecture.embedding_norm, config)
        self.recurrence = Recurrence.of(source, config)
        blocks: dict[int, DecoderLayer] = {}
        self.layers: list[DecoderLayer] = []
        for index, (place, layer) in enumerate(zip(places, config.layers, strict=True)):
            block = self.recurrence.block(index) if self.recurrence else index
            if block not in blocks:
                blocks[block] = DecoderLayer(replace(source, place=place, prefix=f"blk.{block}."), config, layer)
            self.layers.append(blocks[block])
        self.has_states = any(isinstance(spec, StateSpec) for layer in self.layers for spec in layer.caches)
        self.output_norm = Norm.of(source, config.architecture.output_norm, config)
        if source.has("output"):
            self.output = source.linear("output", self.vocabulary, config.hidden_size)
        else:
            self.output = Linear(self.embedding, source.optional_vector("output.bias", self.vocabulary))
        check_all_used(adapters)
        self.rotaries = {
            layer.rotary: Rotary(layer.rotary, _rotary_divisors(source, config, layer.rotary))
            for layer in config.layers
            if layer.rotary
        }

    def forward(self, batch: Batch, caches: Sequence[Sequence[Cache]], precision: Precision) -> torch.Tensor:
        """The hidden states (R, hidden) float32 of the batch's `logit_rows`, as the output matrix reads them.

        Every layer's caches take the new tokens.
        """
        steps: dict[torch.device, Step] = {}
        outer = self._step(steps, batch, self.outer, precision)
        # Kernels start on the current GPU, which need not be the one that a layer lies on.
        with torch.cuda.device_of(outer.batch.token_ids):
            residual = self._embed(outer.batch)
        embedded = residual.clone() if self.config.architecture.embedding_skip else None
        self.clear_states(batch.new_slots, caches)

        def through(residual: torch.Tensor, layers: range) -> Stream:
            delta = None
            for index in layers:
                layer = self.layers[index]
                step = self._step(steps, batch, layer.place, precision)
                residual, delta = _moved(residual, delta, layer.place.device)
                if embedded is not None:
                    step.embedded = embedded.to(layer.place.device)
                with torch.cuda.device_of(residual):
                    delta = layer.forward(residual, delta, step, caches[index])
            return _moved(residual, delta, self.outer.device)

        if self.recurrence:
            with torch.cuda.device_of(residual):
                residual, delta = self.recurrence.forward(residual, through), None
        else:
            residual, delta = through(residual, range(len(self.layers)))
        rows = outer.batch.logit_rows
        delta = None if delta is None else delta[rows]
        with torch.cuda.device_of(residual):
            return enter(self.output_norm, residual[rows], delta)

    def clear_states(self, slots: torch.Tensor, caches: Sequence[Sequence[Cache]]) -> None:
        """Zeroes the recurrent states in these slots (int64)."""
        if not (len(slots) and self.has_states):
            return
        for layer, layer_caches in zip(self.layers, caches, strict=True):
            for cache in layer_caches:
                if isinstance(cache, StateCache):
                    cache.clear(slots.to(layer.place.device))

    def logits(self, hidden: torch.Tensor, precision: Precision) -> torch.Tensor:
        """hidden (R, hidden) -> (R, vocabulary) float32."""
        config = self.config
        with torch.cuda.device_of(hidden):
            (logits,) = project(hidden, [self.output], precision)
        if config.logit_scale != 1.0:
            logits *= config.logit_scale
        if config.logit_soft_cap:
            logits.div_(config.logit_soft_cap).tanh_().mul_(config.logit_soft_cap)
        return logits

    def _embed(self, batch: Batch) -> torch.Tensor:
        operations, config = self.outer.operations, self.config
        x = operations.embedding(batch.token_ids, self.embedding)
        if config.embedding_scale != 1.0:
            x *= config.embedding_scale
        if self.positions is not None:
            x += operations.embedding(batch.positions, self.positions)
        if self.token_type is not None:
            x += self.token_type
        return self.embedding_norm(x) if self.embedding_norm else x

    def _step(self, steps: dict[torch.device, Step], batch: Batch, place: Place, precision: Precision) -> Step:
        if place.device not in steps:
            steps[place.device] = Step(batch.to(place.device), self.rotaries, precision)
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


def _rotary_divisors(source: TensorSource, config: ModelConfig, rotary: RotaryConfig) -> torch.Tensor | None:
    """The factors that stretch each frequency: one tensor (Llama 3.1), or one for long contexts and one for short."""
    long = config.context_length > rotary.original_context
    names = ("rope_freqs", f"rope_factors_{'long' if long else 'short'}")
    name = next((name for name in names if source.has(name)), None)
    return name and source.vector(f"{name}.weight", rotary.dimensions // 2)
