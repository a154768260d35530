"""Scans: layers that carry a matrix a head from token to token, and change it by each token in turn."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from trichord.cpu_fallback.jit import have_numba


def state_scan(
    x: torch.Tensor,
    step_sizes: torch.Tensor,
    rates: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    states: torch.Tensor,
    state_slots: torch.Tensor,
    query_starts: torch.Tensor,
) -> torch.Tensor:
    """The selective scan of Mamba: x (T, H, P) -> (T, H, P) contiguous, updating states (B, H, P, N); all float32.

    Token by token, state = exp(step_sizes * rates) * state + step_sizes * x outer b; y = state c (Gu and Dao, 2023;
    Dao and Gu, 2024). step_sizes (T, H). rates (H, N), or (H, 1) where a head's are equal. b, c (T, G, N): head h reads
    group h // (H / G). Sequence s owns the tokens query_starts[s]:query_starts[s+1] (query_starts (S+1,) int32) and
    the state at state_slots[s] (S,) int64. Of x, step_sizes, b and c only the last dimension must be contiguous, of
    states what is within a slot.
    """
    tokens, heads, rows = x.shape
    groups, columns = b.shape[1:]
    output = torch.empty((tokens, heads, rows), dtype=torch.float32)
    if not have_numba():
        steps, decays, y = step_sizes.numpy()[:, :, None], rates.numpy(), output.numpy()
        inputs, b, c = (x.numpy() * steps)[..., None], b.numpy()[:, :, None], c.numpy()[:, :, :, None]
        for token, state in _states_by_token(states, state_slots, query_starts):
            state *= np.exp(steps[token] * decays)[:, None]
            grouped = state.reshape(groups, -1, columns)
            grouped += inputs[token].reshape(groups, -1, 1) * b[token]
            y[token] = (grouped @ c[token]).reshape(heads, rows)
        return output
    from trichord.cpu_fallback.state_kernels import ROWS, scan_states

    inputs = *_place(x), *_place(step_sizes)[:2], rates.data_ptr(), rates.shape[1], *_place(b), *_place(c)
    fields = *_batch(states, state_slots, query_starts), output.data_ptr(), *inputs, heads, rows, groups, columns
    scan_states(-(-heads * rows // ROWS), tokens * ROWS * columns, *fields)
    return output


def delta_scan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor | None,
    states: torch.Tensor,
    state_slots: torch.Tensor,
    query_starts: torch.Tensor,
    *,
    tiled: bool = False,
) -> torch.Tensor:
    """Linear attention with decay, by the delta rule when beta is given: -> (T, H, Dv) contiguous; all float32.

    Token by token, state = exp(decay) * state; state += k outer (beta * (v - k state)), or k outer v without beta;
    y = q state (Yang et al., 2024). q, k (T, G, D): head h reads head h // (H / G), or h % G when `tiled`. v (T, H,
    Dv). decay (T, H, 1), or (T, H, D) for each row its own. beta (T, H). Sequence s owns the tokens
    query_starts[s]:query_starts[s+1] (query_starts (S+1,) int32) and of states (B, H, D, Dv) the one at
    state_slots[s] (S,) int64. Of q, k, v, decay and beta only the last dimension must be contiguous, of states what
    is within a slot.
    """
    tokens, heads, columns = v.shape
    groups, rows = k.shape[1:]
    output = torch.empty((tokens, heads, columns), dtype=torch.float32)
    if not have_numba():
        group = np.arange(heads) % groups if tiled else np.arange(heads) // (heads // groups)
        queries, keys, values, y = q.numpy(), k.numpy(), v.numpy(), output.numpy()
        factors, strengths = np.exp(decay.numpy())[..., None], None if beta is None else beta.numpy()[..., None, None]
        for token, state in _states_by_token(states, state_slots, query_starts):
            state *= factors[token]
            key, change = keys[token][group][:, None], values[token][:, None]
            if strengths is not None:
                change = strengths[token] * (change - key @ state)
            state += key.swapaxes(1, 2) * change
            y[token] = (queries[token][group][:, None] @ state)[:, 0]
        return output
    from trichord.cpu_fallback.state_kernels import COLUMNS, scan_deltas

    strength = (0, 0) if beta is None else _place(beta)[:2]
    inputs = *_place(q), *_place(k), *_place(v), *_place(decay), decay.shape[2], *strength
    fields = *_batch(states, state_slots, query_starts), output.data_ptr(), *inputs, heads, groups, tiled, rows, columns
    scan_deltas(heads * -(-columns // COLUMNS), tokens * rows * COLUMNS, *fields)
    return output


def _place(x: torch.Tensor) -> tuple[int, int, int]:
    """Address, and elements from one index to the next in the first and in the second dimension."""
    return x.data_ptr(), *x.stride()[:2]


def _batch(states: torch.Tensor, state_slots: torch.Tensor, query_starts: torch.Tensor) -> tuple[int, ...]:
    """Where the states and the sequences are: the first fields of the kernels' records, without the output."""
    return states.data_ptr(), states.stride(0), state_slots.data_ptr(), query_starts.data_ptr(), len(state_slots)


def _states_by_token(
    states: torch.Tensor, state_slots: torch.Tensor, query_starts: torch.Tensor
) -> Iterator[tuple[int, np.ndarray]]:
    """Every token, and its sequence's state to change in place."""
    starts = query_starts.tolist()
    for slot, start, end in zip(state_slots.tolist(), starts, starts[1:], strict=False):
        for token in range(start, end):
            yield token, states[slot].numpy()
