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
