"""What attention makes of a query's scores in place before they weigh the values: caps, slopes, the softmax."""

from __future__ import annotations

import numpy as np

from trichord.cpu_fallback.jit import compiled
from trichord.cpu_fallback.native import exp


@compiled(fastmath={"contract"})
def _tanh(x):  # type: ignore[no-untyped-def]
    """tanh(x), float32: the polynomial of Cephes' tanhf near zero, where the exponential would cancel."""
    one, two = np.float32(1.0), np.float32(2.0)
    far = one - two / (exp(two * abs(x)) + one)
    square = x * x
    near = np.float32(-5.70498872745e-3)
    near = near * square + np.float32(2.06390887954e-2)
    near = near * square + np.float32(-5.37397155531e-2)
    near = near * square + np.float32(1.33314422036e-1)
    near = near * square + np.float32(-3.33332819422e-1)
    near = near * square * x + x
    return near if abs(x) < np.float32(0.625) else (far if x > 0 else -far)


@compiled
def cap(scores, limit):  # type: ignore[no-untyped-def]
    """Scores -> limit * tanh(score / limit)."""
    for index in range(len(scores)):
        scores[index] = limit * _tanh(scores[index] / limit)


@compiled
def tilt(scores, slope, distance):  # type: ignore[no-untyped-def]
    """Adds slope * distance to the first score, slope * (distance + 1) to the next, and so on."""
    for index in range(len(scores)):
        scores[index] += slope * np.float32(distance + index)


@compiled(fastmath={"reassoc", "contract", "nnan", "nsz"})
def soften(scores, largest):  # type: ignore[no-untyped-def]
    """Scores -> their exponentials below the new maximum; (maximum, sum)."""
    for index in range(len(scores)):
        largest = max(largest, scores[index])
    total = np.float32(0.0)
    for index in range(len(scores)):
        weight = exp(scores[index] - largest)
        scores[index] = weight
        total += weight
    return largest, total
