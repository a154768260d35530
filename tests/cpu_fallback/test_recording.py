"""Recordings: what is done again follows its inputs, keeps its memory, and refuses what Python decided by a number."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

pytest.importorskip("numba")

from trichord import cpu_fallback
from trichord.cpu_fallback.recording import Unrecordable, capture
from trichord.weight_format import Weight, WeightFormat


def nothing() -> None:
    pass


@pytest.fixture
def weight():
    blocks = torch.randint(0, 100, (2000, 18 * 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Weight(blocks, WeightFormat.Q4_0, (2000, 256), "blocks")


def test_a_recording_follows_its_inputs(weight):
    """Products on threads, a norm that updates its input, a copy that a schema calls an alias, views, additions."""
    ids, gain = torch.zeros(2, dtype=torch.int64), torch.rand(256)

    def compute():
        residual = cpu_fallback.embedding(ids, weight)
        angle = ids.to(torch.float64)[:, None].cos().float()
        x = cpu_fallback.norm(residual, gain, 1e-5, residual * 2)
        (y,) = cpu_fallback.matmul(x, [weight], "default")
        gate, up = y.chunk(2, dim=1)
        z = cpu_fallback.activate(gate, up, "silu")
        z += angle
        return torch.cat((z, residual[:, :5]), dim=1)

    with torch.inference_mode():
        replay = capture(compute, nothing)
        gc.collect()
        rubbish = [torch.rand(1000) for _ in range(200)]  # takes memory that nobody holds
        for first, second in ((3, 1999), (0, 7), (11, 11)):
            ids.copy_(torch.tensor([first, second]))
            assert torch.equal(replay(), compute())
    del rubbish


def test_a_recording_routes_anew(weight):
    """A mixture of experts: which matrices are multiplied goes by numbers, each time."""
    experts = Weight(weight.data, weight.format, (10, 200, 256), "blocks")
    x = torch.zeros(3, 256)

    def compute():
        logits = x[:, :10] * 2.0
        chosen, weights = cpu_fallback.route(logits, 4, "softmax", normalize=True)
        first, second = cpu_fallback.expert_matmul(x * 0.5, [experts, experts], chosen, "default")
        return torch.bmm(weights[:, None], first + second)[:, 0]

    with torch.inference_mode():
        replay = capture(compute, nothing)
        results = []
        for seed in range(4):
            x.copy_(torch.randn(3, 256, generator=torch.Generator().manual_seed(seed)))
            results.append(replay().clone())
            assert torch.equal(results[-1], compute())
        assert not torch.equal(results[0], results[1])


def test_threads_record_beside_each_other():
    """A recording that begins and ends in another thread leaves this thread's alone."""
    x, y = torch.ones(4), torch.ones(4)

    def record_another():
        with torch.inference_mode():
            capture(lambda: y * 3, nothing)

    def compute():
        doubled = x * 2
        other = threading.Thread(target=record_another)
        other.start()
        other.join()
        return doubled + 1

    with torch.inference_mode():
        replay = capture(compute, nothing)
        x.fill_(5.0)
        assert torch.equal(replay(), torch.full((4,), 11.0))


@pytest.mark.parametrize(
    "decided",
    [
        lambda x: x * x.sum().item(),
        lambda x: x[: int(x.argmax())],
    ],
)
def test_what_python_decides_by_a_number_is_not_recorded(decided):
    x = torch.rand(8)
    with torch.inference_mode(), pytest.raises(Unrecordable):
        capture(lambda: decided(x), nothing)
    with torch.inference_mode():
        assert cpu_fallback.capture(lambda: decided(x), nothing) is None
        decided(x)  # not recording any longer


def test_what_does_not_repeat_is_found_out():
    """State that a run changes must be brought back, or the recording cannot be told from a wrong one."""
    state = torch.ones(4)

    def drifts():
        state.mul_(2)
        return state.clone()

    with torch.inference_mode(), pytest.raises(RuntimeError, match="does not repeat"):
        capture(drifts, nothing)
    with torch.inference_mode():
        replay = capture(drifts, lambda: state.fill_(1.0))
        state.fill_(5.0)
        assert torch.equal(replay(), torch.full((4,), 10.0))
