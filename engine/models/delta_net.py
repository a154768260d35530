"""The gated delta rule: linear attention that corrects what its memory holds under a key (Yang et al., 2412.06464)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trichord.cache import StateCache, StateSpec
from trichord.dispatch import Prepared
from trichord.models.config import LayerConfig, ModelConfig
from trichord.models.linear import TensorSource, project
from trichord.models.norm import Norm
from trichord.models.step import Step


class DeltaNet:
    """What both forms share: convolved queries, keys and values, the scan, the norm of its result by heads.

    A subclass loads its projections, says of a token what enters the convolution, how much each head forgets and
    learns, and gates the result.
    """

    KERNELS: tuple[str, ...]
    """The tensors of the convolution, which together cover queries, keys and values."""

    def __init__(self, source: TensorSource, config: ModelConfig, groups: int, heads: int, size: int) -> None:
        if not size or not groups or heads % groups:
            raise source.fail(f"{heads} heads of {size} cannot share {groups} keys")
        self.operations = source.place.operations
        self.groups, self.heads, self.size = groups, heads, size
        self.key_width, self.value_width = groups * size, heads * size
        self.norm = Norm.of(source, ("ssm_norm",), config, size=size)
        self.rates = source.vector("ssm_a", heads, 1)
        channels, taps = 2 * self.key_width + self.value_width, source.shape(self.KERNELS[0])[-1]
        parts = [source.vector(f"{name}.weight", channels // len(self.KERNELS), taps) for name in self.KERNELS]
        self.kernel = torch.cat(parts)
        self.cache = StateSpec(((channels, taps - 1), (heads, size, size)))
        # Queries and keys become unit vectors, queries divided by the root of their size as well: an RMS norm, times
        # one over the root.
        gain = torch.full((2 * groups, size), size**-0.5, device=source.place.device)
        gain[:groups] *= size**-0.5
        self.unit_norm = Norm(self.operations, gain, None, config.norm_epsilon**2 / size, centered=False)

    def scan(
        self,
        mixed: torch.Tensor,
        forgetting: torch.Tensor,
        learning: torch.Tensor,
        step: Step,
        cache: StateCache,
        *,
        tiled: bool = False,
    ) -> torch.Tensor:
        """Queries, keys and values (T, channels) -> (T, H, D), normalised.

        forgetting (T, H, 1) or (T, H, D), before softplus and the heads' rates; learning (T, H), before its sigmoid.
        """
        batch, tokens = step.batch, len(mixed)
        sequences = batch.state_slots, batch.query_starts
        past, states = cache.states
        mixed = self.operations.short_convolution(mixed, self.kernel, None, past, *sequences, "silu")
        keys, v = mixed.split([2 * self.key_width, self.value_width], dim=1)
        q, k = self.unit_norm.of_rows(keys.view(tokens, 2 * self.groups, -1)).split(self.groups, dim=1)
        v = v.view(tokens, self.heads, -1)
        decay = F.softplus(forgetting) * self.rates
        y = self.operations.delta_scan(q, k, v, decay, learning.sigmoid(), states, *sequences, tiled=tiled)
        return self.norm.of_rows(y)


class GatedDeltaNet(DeltaNet):
    """The form of Qwen3-Next and Qwen3.5: every head forgets as a whole; several share a query and a key."""

    KERNELS = ("ssm_conv1d",)

    def __init__(self, source: TensorSource, config: ModelConfig, layer: LayerConfig) -> None:
        space = config.state_space
        super().__init__(source, config, space.groups, space.heads, space.state_size)
        if space.inner_size != self.value_width:
            raise source.fail(f"{self.heads} heads of {self.size} do not make an inner size of {space.inner_size}")
        hidden, heads, mixed = config.hidden_size, self.heads, len(self.kernel)
        # One matrix may hold what a key's heads need, key after key.
        self.joint = not source.has("attn_qkv")
        self.joint_strengths = source.has("ssm_ba")
        width = self.value_width
        shapes = {"ssm_in": mixed + width} if self.joint else {"attn_qkv": mixed, "attn_gate": width}
        shapes.update({"ssm_ba": 2 * heads} if self.joint_strengths else {"ssm_beta": heads, "ssm_alpha": heads})
        self.inputs = [source.linear(name, rows, hidden) for name, rows in shapes.items()]
        self.bias = source.vector("ssm_dt.bias", heads)
        self.output = source.linear("ssm_out", hidden, width)

    def forward(self, x: torch.Tensor | Prepared, step: Step, cache: StateCache) -> torch.Tensor:
        """x (T, hidden) -> (T, hidden); moves the sequences' states on."""
        products = project(x, self.inputs, step.precision)
        shared = self.heads // self.groups
        if self.joint:
            widths = [self.size, self.size, shared * self.size, shared * self.size]
            q, k, v, gate = self._by_key(products.pop(0), widths)
            mixed = torch.cat((q, k, v), dim=1)
        else:
            mixed, gate = products.pop(0), products.pop(0)
        learning, forgetting = self._by_key(products[0], [shared, shared]) if self.joint_strengths else products
        # Files with separate matrices lay heads out key by key in turn.
        y = self.scan(mixed, (forgetting + self.bias)[..., None], learning, step, cache, tiled=not self.joint_strengths)
        y = self.operations.activate(gate, y.view(len(x), -1), "silu", prepare=step.precision)
        (y,) = project(y, [self.output], step.precision)
        return y

    def _by_key(self, product: torch.Tensor, widths: list[int]) -> list[torch.Tensor]:
        """Takes apart what lies key after key: [(T, groups * width), ...]."""
        parts = product.view(len(product), self.groups, -1).split(widths, dim=2)
        return [part.reshape(len(product), -1) for part in parts]


class KimiDeltaNet(DeltaNet):
    """Kimi Delta Attention (2510.26692): every row of a head's memory forgets at its own rate."""

    KERNELS = ("ssm_conv1d_q", "ssm_conv1d_k", "ssm_conv1d_v")

    def __init__(self, source: TensorSource, config: ModelConfig, layer: LayerConfig) -> None:
        hidden, size = config.hidden_size, source.shape("ssm_norm")[-1]
        heads = source.shape("attn_q")[0] // size
        super().__init__(source, config, heads, heads, size)
        width, rank = heads * size, source.shape("ssm_f_a")[0]
        self.inputs = [source.linear(f"attn_{name}", width, hidden) for name in "qkv"]
        self.inputs.append(source.linear("ssm_beta", heads, hidden))
        self.inputs += [source.linear(name, rank, hidden) for name in ("ssm_f_a", "ssm_g_a")]
        self.forgetting = source.linear("ssm_f_b", width, rank)
        self.gate = source.linear("ssm_g_b", width, rank)
        self.bias = source.vector("ssm_dt.bias", width)
        self.output = source.linear("attn_output", hidden, width)

    def forward(self, x: torch.Tensor | Prepared, step: Step, cache: StateCache) -> torch.Tensor:
        """x (T, hidden) -> (T, hidden); moves the sequences' states on."""
        q, k, v, learning, forgetting, gate = project(x, self.inputs, step.precision)
        (forgetting,) = project(forgetting, [self.forgetting], step.precision)
        (gate,) = project(gate, [self.gate], step.precision)
        forgetting = forgetting.add_(self.bias).view(len(x), self.heads, -1)
        y = self.scan(torch.cat((q, k, v), dim=1), forgetting, learning, step, cache)
        (y,) = project(y.view(len(x), -1).mul_(gate.sigmoid_()), [self.output], step.precision)
        return y
