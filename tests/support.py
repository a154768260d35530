"""What several tests need: the parity data, the formats of each backend, relative errors."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

PARITY = Path(os.environ.get("TRICHORD_PARITY_DATA", Path(__file__).resolve().parents[2] / "shared" / "parity"))


def parity(name: str) -> Path:
    """The path of one file of the parity data; the test is skipped where the data is absent."""
    path = PARITY / name
    if not path.exists():
        pytest.skip(f"parity data not found: {path} (set TRICHORD_PARITY_DATA)", allow_module_level=True)
    return path


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Frobenius norm of the difference over that of the expected values, in float64."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def eight_bits(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 8-bit cache of (..., D): its numbers, and its scales, one for 32 elements or what is left of a row."""
    numbers = np.empty(x.shape, np.int8)
    scales = np.empty((*x.shape[:-1], -(-x.shape[-1] // 32)), np.float16)
    for group in range(scales.shape[-1]):
        part = x[..., 32 * group : 32 * group + 32].astype(np.float64)
        scales[..., group] = abs(part).max(axis=-1) / 127
        scale = scales[..., group, None].astype(np.float64)
        quotients = np.divide(part, scale, out=np.zeros_like(part), where=scale > 0)
        numbers[..., 32 * group : 32 * group + 32] = quotients.round().clip(-127, 127)
    return numbers, scales


def from_eight_bits(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What the 8-bit cache holds, in float64."""
    return numbers * np.repeat(scales.astype(np.float64), 32, axis=-1)[..., : numbers.shape[-1]]
