"""Short convolution and scans: both backends against the recurrences' definitions in float64, on ragged batches."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from support import relative_error

from trichord.dispatch import Operations, operations


@dataclass(frozen=True)
class Backend:
    """A backend's operations and where its tensors live."""

    operations: Operations
    device: str


TRITON = Backend(operations("planes"), "cuda" if torch.cuda.is_available() else "cpu")
CPU = Backend(operations("blocks"), "cpu")


@pytest.fixture(params=["triton", "cpu", "numpy"])
def backend(request, monkeypatch) -> Backend:
    """Triton, and the CPU backend with and without Numba."""
    if request.param == "numpy":
        for name in ("convolution", "scan", "activation"):
            monkeypatch.setattr(importlib.import_module(f"trichord.cpu_fallback.{name}"), "have_numba", lambda: False)
    return TRITON if request.param == "triton" else CPU


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def positive(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).uniform(0.01, 1, shape).astype(np.float32)


@dataclass(frozen=True)
class Batch:
    """Sequences of these lengths, with their states in scrambled slots of which some belong to no one."""

    lengths: tuple[int, ...]

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum([0, *self.lengths]).astype(np.int32)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def slots(self) -> np.ndarray:
        return np.random.default_rng(len(self.lengths)).permutation(len(self.lengths) + 2)[: len(self.lengths)]

    def states(self, *shape: int) -> np.ndarray:
        return normal(len(self.lengths) + 2, *shape, seed=9)


LENGTHS = (1, 1), (5,), (3, 1, 7)
batches = pytest.mark.parametrize("batch", [pytest.param(Batch(x), id="-".join(map(str, x))) for x in LENGTHS])


def check(
    backend: Backend,
    batch: Batch,
    operation: Callable[..., torch.Tensor],
    oracle: Callable[..., np.ndarray],
    inputs: dict[str, np.ndarray | None],
    states: np.ndarray,
    **constants: np.ndarray | None,
) -> None:
    """The operation against the oracle, which advances one sequence's state (float64) by its tokens.

    The oracle gets the sequence's rows of the inputs, the operation all of them, as slices of something wider.
    """
    expected_states, expected = states.astype(np.float64), []
    for slot, start, end in zip(batch.slots, batch.starts, batch.starts[1:], strict=False):
        own = {name: x if x is None else x[start:end].astype(np.float64) for name, x in inputs.items()}
        expected.append(oracle(expected_states[slot], **own, **constants))
    tensors = {name: x if x is None else _slice(backend, x) for name, x in inputs.items()}
    tensors |= {name: x if x is None else torch.from_numpy(x).to(backend.device) for name, x in constants.items()}
    left = _slice(backend, states)
    slots, starts = (torch.from_numpy(x).to(backend.device) for x in (batch.slots, batch.starts))
    y = operation(**tensors, states=left, state_slots=slots, query_starts=starts)
    assert y.dtype == torch.float32 and y.is_contiguous()
    assert relative_error(y.cpu(), np.concatenate(expected)) < 2e-6
    assert relative_error(left.cpu(), expected_states) < 2e-6
    others = np.setdiff1d(np.arange(len(states)), batch.slots)
    np.testing.assert_array_equal(left.cpu()[others], states[others])


def _slice(backend: Backend, x: np.ndarray) -> torch.Tensor:
    """A copy on the device, whose rows lie between numbers that are not to be read."""
    gap = torch.full((len(x), 3), torch.nan)
    rows = torch.cat([gap, torch.from_numpy(x.reshape(len(x), -1)), gap], 1).to(backend.device)
    return rows[:, 3:-3].unflatten(1, x.shape[1:])


# Short convolution


def convolution_oracle(state, x, kernel, bias, activation) -> np.ndarray:
    joined, width = np.concatenate([state.T, x]), kernel.shape[1]
    y = np.stack([(joined[t : t + width] * kernel.T).sum(0) for t in range(len(x))]) + (0 if bias is None else bias)
    state[:] = joined[len(x) :].T
    return y / (1 + np.exp(-y)) if activation == "silu" else y


@batches
@pytest.mark.parametrize("channels, width, biased, activation", [(70, 4, True, "silu"), (33, 3, False, None)])
def test_short_convolution(backend, batch, channels, width, biased, activation):
    bias = normal(channels, seed=2) if biased else None
    check(
        backend,
        batch,
        lambda **tensors: backend.operations.short_convolution(**tensors, activation=activation),
        lambda state, **own: convolution_oracle(state, **own, activation=activation),
        {"x": normal(batch.tokens, channels)},
        batch.states(channels, width - 1),
        kernel=normal(channels, width, seed=1),
        bias=bias,
    )


def test_short_convolution_by_hand(backend):
    """One channel, kernel (1, 10, 100) from the oldest input to the newest, 3 and 4 from before, then 5 and 6."""
    x, kernel = torch.tensor([[5.0], [6.0]]), torch.tensor([[1.0, 10.0, 100.0]])
    states, slots, starts = torch.tensor([[[3.0, 4.0]]]), torch.tensor([0]), torch.tensor([0, 2], dtype=torch.int32)
    arguments = [tensor.to(backend.device) for tensor in (x, kernel, states, slots, starts)]
    y = backend.operations.short_convolution(*arguments[:2], None, *arguments[2:], None)
    assert y.tolist() == [[543.0], [654.0]] and arguments[2].tolist() == [[[5.0, 6.0]]]


# Selective scan


def state_oracle(state, x, step_sizes, rates, b, c) -> np.ndarray:
    group = np.arange(x.shape[1]) // (x.shape[1] // b.shape[1])
    y = np.empty_like(x)
    for t, step in enumerate(step_sizes):
        state *= np.exp(step[:, None] * rates)[:, None]
        state += np.einsum("h,hp,hn->hpn", step, x[t], b[t, group])
        y[t] = np.einsum("hpn,hn->hp", state, c[t, group])
    return y


@batches
@pytest.mark.parametrize(
    "heads, rows, groups, columns, head_rates",
    [
        pytest.param(70, 1, 1, 16, 16, id="mamba"),
        pytest.param(6, 20, 2, 24, 1, id="mamba2"),
        pytest.param(2, 8, 1, 128, 1, id="wide"),
        pytest.param(3, 5, 3, 7, 7, id="odd"),
    ],
)
def test_state_scan(backend, batch, heads, rows, groups, columns, head_rates):
    inputs = {
        "x": normal(batch.tokens, heads, rows),
        "step_sizes": positive(batch.tokens, heads),
        "b": normal(batch.tokens, groups, columns, seed=2),
        "c": normal(batch.tokens, groups, columns, seed=3),
    }
    states, rates = batch.states(heads, rows, columns), -3 * positive(heads, head_rates, seed=1)
    check(backend, batch, backend.operations.state_scan, state_oracle, inputs, states, rates=rates)


# Delta rule


def delta_oracle(state, q, k, v, decay, beta, tiled) -> np.ndarray:
    heads, groups = v.shape[1], k.shape[1]
    group = np.arange(heads) % groups if tiled else np.arange(heads) // (heads // groups)
    y = np.empty_like(v)
    for t in range(len(v)):
        state *= np.exp(decay[t])[..., None]
        read = np.einsum("hd,hde->he", k[t, group], state)
        change = v[t] if beta is None else beta[t][:, None] * (v[t] - read)
        state += np.einsum("hd,he->hde", k[t, group], change)
        y[t] = np.einsum("hd,hde->he", q[t, group], state)
    return y


@batches
@pytest.mark.parametrize(
    "heads, groups, rows, columns, decays, delta, tiled",
    [
        pytest.param(4, 2, 32, 40, 1, True, False, id="gated"),
        pytest.param(4, 2, 32, 40, 1, True, True, id="tiled"),
        pytest.param(2, 2, 48, 24, 48, True, False, id="channels"),
        pytest.param(4, 4, 24, 8, 1, False, False, id="lightning"),
        pytest.param(3, 1, 7, 5, 7, False, False, id="odd"),
    ],
)
def test_delta_scan(backend, batch, heads, groups, rows, columns, decays, delta, tiled):
    k = normal(batch.tokens, groups, rows, seed=1)
    inputs = {
        "q": normal(batch.tokens, groups, rows),
        "k": k / np.linalg.norm(k, axis=2, keepdims=True),
        "v": normal(batch.tokens, heads, columns, seed=2),
        "decay": -2 * positive(batch.tokens, heads, decays, seed=3),
        "beta": positive(batch.tokens, heads, seed=4) if delta else None,
    }
    check(
        backend,
        batch,
        lambda **tensors: backend.operations.delta_scan(**tensors, tiled=tiled),
        lambda state, **own: delta_oracle(state, **own, tiled=tiled),
        inputs,
        batch.states(heads, rows, columns),
    )


def test_delta_scan_takes_one_decay_for_all_tokens(backend):
    """Decays that are expanded from a head's, as in lightning attention, where tokens are no distance apart."""
    q, k, v, decay = normal(4, 2, 8), normal(4, 2, 8, seed=1), normal(4, 2, 8, seed=2), -positive(2)
    slots, starts = torch.tensor([0]), torch.tensor([0, 4], dtype=torch.int32)
    tensors = [torch.from_numpy(x).to(backend.device) for x in (q, k, v)]
    state = torch.zeros(1, 2, 8, 8, device=backend.device)
    shared = torch.from_numpy(decay).to(backend.device)[:, None].expand(4, 2, 1)
    y = backend.operations.delta_scan(*tensors, shared, None, state, slots.to(state.device), starts.to(state.device))
    expected = delta_oracle(np.zeros((2, 8, 8)), q, k, v, np.broadcast_to(decay[:, None], (4, 2, 1)), None, False)
    assert relative_error(y.cpu(), expected) < 2e-6


# All of them


def test_work_is_shared_among_threads():
    """Enough for the CPU's threads, in uneven parts: a long prompt beside single tokens."""
    batch = Batch((1, 40, 1))
    tokens = batch.tokens
    check(
        CPU,
        batch,
        lambda **tensors: CPU.operations.short_convolution(**tensors, activation="silu"),
        lambda state, **own: convolution_oracle(state, **own, activation="silu"),
        {"x": normal(tokens, 500)},
        batch.states(500, 3),
        kernel=normal(500, 4, seed=1),
        bias=None,
    )
    x, steps = normal(tokens, 50, 4), positive(tokens, 50)
    inputs = {"x": x, "step_sizes": steps, "b": normal(tokens, 2, 16), "c": normal(tokens, 2, 16, seed=1)}
    check(CPU, batch, CPU.operations.state_scan, state_oracle, inputs, batch.states(50, 4, 16), rates=-positive(50, 16))
    q, v, decay = normal(tokens, 3, 40) / 7, normal(tokens, 6, 72), -positive(tokens, 6, 40)
    inputs = {"q": q, "k": q[::-1].copy(), "v": v, "decay": decay, "beta": positive(tokens, 6)}
    check(
        CPU,
        batch,
        CPU.operations.delta_scan,
        lambda state, **own: delta_oracle(state, **own, tiled=False),
        inputs,
        batch.states(6, 40, 72),
    )


@pytest.mark.parametrize("name", ["short_convolution", "state_scan", "delta_scan"])
def test_a_prompt_in_pieces_is_the_prompt(backend, name):
    """The same numbers exactly, whether the tokens come at once, in chunks or one by one beside another sequence."""
    tokens, heads, rows, columns = 11, 4, 8, 16
    sequences = {
        "short_convolution": [normal(tokens, columns)],
        "state_scan": [normal(tokens, heads, rows), positive(tokens, heads), *(normal(tokens, 1, columns),) * 2],
        "delta_scan": [
            *(normal(tokens, heads, rows) / 3,) * 2,
            normal(tokens, heads, columns),
            -positive(tokens, heads, 1),
            positive(tokens, heads),
        ],
    }[name]
    shape = {
        "short_convolution": (columns, 3),
        "state_scan": (heads, rows, columns),
        "delta_scan": (heads, rows, columns),
    }
    constants = {"short_convolution": [normal(columns, 4), None], "state_scan": [-positive(heads, columns)]}.get(
        name, []
    )
    device = backend.device

    def run(states: torch.Tensor, parts: list[list[np.ndarray]], slots: list[int]) -> np.ndarray:
        joined = [torch.from_numpy(np.concatenate(pieces)).to(device) for pieces in zip(*parts, strict=True)]
        fixed = [x if x is None else torch.from_numpy(x).to(device) for x in constants]
        place = 2 if name == "state_scan" else 1
        starts = torch.tensor(np.cumsum([0, *(len(part[0]) for part in parts)]), dtype=torch.int32, device=device)
        last = ["silu"] if name == "short_convolution" else []
        arguments = *joined[:place], *fixed, *joined[place:], states, torch.tensor(slots, device=device), starts, *last
        return getattr(backend.operations, name)(*arguments).cpu().numpy()

    whole, pieces = (torch.zeros(3, *shape[name], device=device) for _ in range(2))
    expected = run(whole, [sequences], [1])
    outputs = []
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 11)):
        part, other = [x[start:end] for x in sequences], [x[:2] for x in sequences]
        outputs.append(run(pieces, [other, part], [2, 1])[2:])
    np.testing.assert_allclose(np.concatenate(outputs), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(pieces[1].cpu(), whole[1].cpu(), rtol=1e-6, atol=1e-7)
    assert pieces[2].count_nonzero() and not pieces[0].count_nonzero()
