"""Rotary position embedding: the frequency of each pair of dimensions, with the scalings that stretch the context.

Su et al., "RoFormer" (2104.09864); linear interpolation: Chen et al. (2306.15595); YaRN: Peng et al. (2309.00071).
Angles are computed once a step for all layers, in float64: at position 100,000 a float32 angle is off by 0.004.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RotaryConfig:
    """What the metadata says of positions. `factor` is how many times the context is stretched (1: not at all)."""

    dimensions: int
    base: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    original_context: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    log_multiplier: float = 0.0
    """YaRN's growth of attention scores with the logarithm of the factor, instead of that of queries and keys."""


class Rotary:
    """The angles of one model. `divisors` (R/2,), from the file's factors tensor, divide the frequencies."""

    def __init__(self, config: RotaryConfig, divisors: torch.Tensor | None = None) -> None:
        pairs = torch.arange(config.dimensions // 2, dtype=torch.float64)
        frequencies = config.base ** (-2.0 * pairs / config.dimensions)
        if divisors is not None:
            frequencies = frequencies / divisors.to("cpu", torch.float64)
        self.magnitude = config.attention_factor
        if config.scaling == "yarn":
            kept = _yarn_share(config, pairs)
            frequencies = frequencies * (kept + (1 - kept) / config.factor)
            self.magnitude *= 1.0 if config.log_multiplier else 1.0 + 0.1 * math.log(config.factor)
        elif config.scaling == "linear":
            frequencies = frequencies / config.factor
        self._frequencies = frequencies

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions (T,) -> cos, sin (T, R/2) float32 on their device."""
        self._frequencies = self._frequencies.to(positions.device)
        angles = positions.to(torch.float64)[:, None] * self._frequencies
        return (angles.cos() * self.magnitude).float(), (angles.sin() * self.magnitude).float()


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x (T, H, D) with its first R elements turned by cos, sin (T, R/2): pairs (2i, 2i+1), or (i, i + R/2)."""
    turning, rest = x.split([2 * cos.shape[1], x.shape[2] - 2 * cos.shape[1]], dim=2)
    a, b = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=2)
    cos, sin = cos[:, None], sin[:, None]
    pair = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack(pair, dim=3).flatten(2) if interleaved else torch.cat(pair, dim=2)
    return torch.cat((turned, rest), dim=2)


def _yarn_share(config: RotaryConfig, pairs: torch.Tensor) -> torch.Tensor:
    """How much of each pair's own frequency YaRN keeps: 1 for fast pairs, 0 for slow ones, a ramp between."""

    def pair_that_turns(turns: float) -> float:
        span = config.original_context / (turns * 2 * math.pi)
        return config.dimensions * math.log(span) / (2 * math.log(config.base))

    low = max(0.0, math.floor(pair_that_turns(config.beta_fast)))
    high = min(config.dimensions - 1.0, math.ceil(pair_that_turns(config.beta_slow)))
    return 1.0 - ((pairs - low) / max(0.001, high - low)).clamp(0.0, 1.0)
