"""Mamba's selective state spaces: the first version (Gu and Dao, 2312.00752), its variant with heads, and the second
(Dao and Gu, 2405.21060)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trichord.cache import StateCache, StateSpec
from trichord.dispatch import Prepared
from trichord.models.config import LayerConfig, ModelConfig
from trichord.models.linear import TensorSource, project
from trichord.models.norm import Norm
from trichord.models.record import BARE
from trichord.models.step import Step


class Mamba:
    """Mamba-1: step sizes, inputs b and outputs c of the state are projections of the convolved input.

    Every channel fades at its own rates, ssm_a (channels, states), or, in PLaMo-2, a whole head at one, ssm_a (heads,).
    """

    def __init__(self, source: TensorSource, config: ModelConfig, layer: LayerConfig) -> None:
        self.operations = source.place.operations
        space = config.state_space
        inner, states = space.inner_size, space.state_size
        self.by_head = not source.has_shape("ssm_a", inner, states)
        self.heads, rates = (space.heads, 1) if self.by_head else (inner, states)
        if not inner or inner % self.heads:
            raise source.fail(f"{self.heads} heads cannot share {inner} channels of the state")
        rank, taps = source.shape("ssm_dt")[-1], source.shape("ssm_conv1d")[-1]
        self.input = source.linear("ssm_in", 2 * inner, config.hidden_size)
        self.kernel = source.vector("ssm_conv1d.weight", inner, taps)
        self.kernel_bias = source.optional_vector("ssm_conv1d.bias", inner)
        self.selection = source.linear("ssm_x", rank + 2 * states, inner)
        order = ("b", "c", "dt") if self.by_head else ("dt", "b", "c")
        self.widths = {name: rank if name == "dt" else states for name in order}
        self.norms = {name: _selection_norm(source, config, name, width) for name, width in self.widths.items()}
        self.step_sizes = source.linear("ssm_dt", self.heads, rank)
        self.rates = source.vector("ssm_a", self.heads, rates)
        self.skip = source.vector("ssm_d", self.heads, 1)
        self.output = source.linear("ssm_out", config.hidden_size, inner)
        self.cache = StateSpec(((inner, taps - 1), (self.heads, inner // self.heads, states)))

    def forward(self, x: torch.Tensor | Prepared, step: Step, cache: StateCache) -> torch.Tensor:
        """x (T, hidden) -> (T, hidden); moves the sequences' states on."""
        batch, tokens = step.batch, len(x)
        sequences = batch.state_slots, batch.query_starts
        past, states = cache.states
        (products,) = project(x, [self.input], step.precision)
        if self.by_head:
            gate, x = (y.reshape(tokens, -1) for y in products.view(tokens, self.heads, -1).chunk(2, dim=2))
        else:
            x, gate = products.chunk(2, dim=1)
        x = self.operations.short_convolution(x, self.kernel, self.kernel_bias, past, *sequences, "silu")
        (selection,) = project(x, [self.selection], step.precision)
        parts = dict(zip(self.widths, selection.split(list(self.widths.values()), dim=1), strict=True))
        parts = {name: norm(parts[name]) if norm else parts[name] for name, norm in self.norms.items()}
        (sizes,) = project(parts["dt"].contiguous(), [self.step_sizes], step.precision)
        x = x.view(tokens, self.heads, -1)
        y = self.operations.state_scan(
            x, F.softplus(sizes), self.rates, parts["b"][:, None], parts["c"][:, None], states, *sequences
        )
        y = y.addcmul_(x, self.skip).view(tokens, -1)
        y = self.operations.activate(gate, y, "silu", prepare=step.precision)
        (y,) = project(y, [self.output], step.precision)
        return y


class Mamba2:
    """Mamba-2: everything is projected at once; heads share b and c by groups and fade at one rate each."""

    def __init__(self, source: TensorSource, config: ModelConfig, layer: LayerConfig) -> None:
        self.operations = source.place.operations
        space = config.state_space
        inner, states, heads, groups = space.inner_size, space.state_size, space.heads, space.groups
        if not inner or inner % heads or heads % groups:
            raise source.fail(f"{heads} heads in {groups} groups cannot share {inner} channels of the state")
        self.heads, self.groups = heads, groups
        channels, taps = inner + 2 * groups * states, source.shape("ssm_conv1d")[-1]
        self.widths = [inner, channels, heads]
        self.inner_widths = [inner, groups * states, groups * states]
        self.input = source.linear("ssm_in", sum(self.widths), config.hidden_size)
        self.kernel = source.vector("ssm_conv1d.weight", channels, taps)
        self.kernel_bias = source.optional_vector("ssm_conv1d.bias", channels)
        self.step_bias = source.vector("ssm_dt.bias", heads)
        self.rates = source.vector("ssm_a", heads, 1)
        self.skip = source.vector("ssm_d", heads, 1)
        self.norm = Norm.of_heads(source, "ssm_norm", groups, inner // groups, config)
        self.output = source.linear("ssm_out", config.hidden_size, inner)
        self.cache = StateSpec(((channels, taps - 1), (heads, inner // heads, states)))

    def forward(self, x: torch.Tensor | Prepared, step: Step, cache: StateCache) -> torch.Tensor:
        """x (T, hidden) -> (T, hidden); moves the sequences' states on."""
        batch, tokens = step.batch, len(x)
        sequences = batch.state_slots, batch.query_starts
        past, states = cache.states
        (products,) = project(x, [self.input], step.precision)
        gate, mixed, sizes = products.split(self.widths, dim=1)
        mixed = self.operations.short_convolution(mixed, self.kernel, self.kernel_bias, past, *sequences, "silu")
        x, b, c = mixed.split(self.inner_widths, dim=1)
        x = x.view(tokens, self.heads, -1)
        b, c = (y.view(tokens, self.groups, -1) for y in (b, c))
        sizes = F.softplus(sizes + self.step_bias)
        y = self.operations.state_scan(x, sizes, self.rates, b, c, states, *sequences)
        y = self.operations.activate(gate, y.addcmul_(x, self.skip).view(tokens, -1), "silu")
        if self.norm:
            y = self.norm.of_rows(y.view(tokens, self.groups, -1)).view(tokens, -1)
        (y,) = project(y, [self.output], step.precision)
        return y


def _selection_norm(source: TensorSource, config: ModelConfig, name: str, width: int) -> Norm | None:
    """The norm of step sizes, b or c: Jamba's and PLaMo-2's with a gain, Falcon Mamba's without."""
    tensor = f"ssm_{name}_norm"
    if source.has(tensor) or source.has_tensor(tensor):
        return Norm.of(source, (tensor,), config, size=width)
    return Norm.of(source, BARE, config) if config.state_space.normed else None
