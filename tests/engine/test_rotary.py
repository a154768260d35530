"""Rotary frequencies by hand and in float64. That scaled ones match llama.cpp is shown on whole models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trichord.rotary import Rotary, RotaryConfig


def angles(config: RotaryConfig, positions: list[int], divisors=None) -> np.ndarray:
    cos, sin = Rotary(config, divisors).tables(torch.tensor(positions))
    assert cos.dtype == torch.float32 and cos.shape == (len(positions), config.dimensions // 2)
    return np.arctan2(sin.double().numpy(), cos.double().numpy())


def test_plain_frequencies_fall_geometrically():
    expected = [3 * 100.0 ** (-2 * i / 8) for i in range(4)]
    wrapped = [math.remainder(angle, 2 * math.pi) for angle in expected]
    assert angles(RotaryConfig(8, base=100.0), [3])[0] == pytest.approx(wrapped, abs=1e-6)


def test_far_positions_keep_their_angle():
    expected = math.remainder(1_000_003.0, 2 * math.pi)
    assert angles(RotaryConfig(2), [1_000_003])[0, 0] == pytest.approx(expected, abs=1e-6)


def test_linear_scaling_and_divisors_slow_the_turn():
    assert angles(RotaryConfig(2, scaling="linear", factor=4.0), [2])[0, 0] == pytest.approx(0.5)
    assert angles(RotaryConfig(2, factor=4.0), [2])[0, 0] == pytest.approx(2.0)  # no scaling named: the factor is idle
    assert angles(RotaryConfig(2), [2], torch.tensor([8.0]))[0, 0] == pytest.approx(0.25)


def test_yarn_keeps_fast_pairs_stretches_slow_ones_and_grows_the_magnitude():
    config = RotaryConfig(64, scaling="yarn", factor=8.0, original_context=256)
    cos, sin = Rotary(config).tables(torch.tensor([1]))
    magnitude = 1 + 0.1 * math.log(8.0)
    assert torch.hypot(cos, sin).numpy() == pytest.approx(np.full((1, 32), magnitude), rel=1e-6)
    turned = np.arctan2(sin.numpy(), cos.numpy())[0]
    assert turned[0] == pytest.approx(1.0, rel=1e-6)
    assert turned[-1] == pytest.approx(10000.0 ** (-62 / 64) / 8, rel=1e-4)
