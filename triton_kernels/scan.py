"""Scans: layers that carry a matrix a head from token to token, and change it by each token in turn.

A program keeps a tile of a state in registers from the sequence's first token to its last, while the inputs of the next
tokens are on their way. What a tile holds meets no other tile: rows of the selective scan, columns of the delta rule.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 1024  # numbers of a state that a program of one warp holds: its sums wait for no other warp
STAGES = tl.constexpr(3)  # tokens whose inputs are on the chip at once; without it each would cost a trip to the memory


@triton.jit
def state_scan_kernel(
    x,
    step_sizes,
    rates,
    b,
    c,
    states,
    state_slots,
    query_starts,
    output,
    x_token,
    x_head,
    step_token,
    b_token,
    b_group,
    c_token,
    c_group,
    slot_stride,
    head_rows,
    group_rows,
    columns,
    ONE_RATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One program BLOCK_ROWS of the rows, of one head or several, that read the same group of a sequence's b and c."""
    group = tl.program_id(1)
    sequence = tl.program_id(2)
    group_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    is_row, is_column = group_row < group_rows, column < columns
    inside = is_row[:, None] & is_column[None, :]
    row = group * group_rows + group_row
    head = row // head_rows
    first = tl.load(query_starts + sequence).to(tl.int64)
    last = tl.load(query_starts + sequence + 1)
    slot = tl.load(state_slots + sequence)
    states += slot * slot_stride
    places = states + row[:, None] * columns + column[None, :]
    state = tl.load(places, mask=inside, other=0.0)
    if ONE_RATE:
        rate = tl.load(rates + head, mask=is_row, other=0.0)[:, None]
    else:
        rate = tl.load(rates + head[:, None] * columns + column[None, :], mask=inside, other=0.0)
    x += first * x_token + head * x_head + row % head_rows
    step_sizes += first * step_token + head
    b += first * b_token + group * b_group + column
    c += first * c_token + group * c_group + column
    width = tl.num_programs(1) * group_rows
    output += first * width + row
    for _ in tl.range(first, last, num_stages=STAGES):
        step = tl.load(step_sizes, mask=is_row, other=0.0)
        scaled = step * tl.load(x, mask=is_row, other=0.0)
        added = tl.load(b, mask=is_column, other=0.0)
        read = tl.load(c, mask=is_column, other=0.0)
        state = state * tl.exp(step[:, None] * rate) + scaled[:, None] * added[None, :]
        tl.store(output, tl.sum(state * read[None, :], axis=1), mask=is_row)
        x += x_token
        step_sizes += step_token
        b += b_token
        c += c_token
        output += width
    tl.store(places, state, mask=inside)


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
    tokens, heads, head_rows = x.shape
    groups, columns = b.shape[1:]
    group_rows = heads // groups * head_rows
    block_columns = triton.next_power_of_2(columns)
    block_rows = min(triton.next_power_of_2(group_rows), max(1, TILE // block_columns))
    output = torch.empty((tokens, heads, head_rows), dtype=torch.float32, device=x.device)
    state_scan_kernel[(triton.cdiv(group_rows, block_rows), groups, len(state_slots))](
        x,
        step_sizes,
        rates,
        b,
        c,
        states,
        state_slots,
        query_starts,
        output,
        *x.stride()[:2],
        step_sizes.stride(0),
        *b.stride()[:2],
        *c.stride()[:2],
        states.stride(0),
        head_rows,
        group_rows,
        columns,
        ONE_RATE=rates.shape[1] == 1,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        num_warps=1,
        enable_fp_fusion=True,
    )
    return output


@triton.jit
def delta_scan_kernel(
    q,
    k,
    v,
    decay,
    beta,
    states,
    state_slots,
    query_starts,
    output,
    q_token,
    q_group,
    k_token,
    k_group,
    v_token,
    v_head,
    decay_token,
    decay_head,
    beta_token,
    slot_stride,
    groups,
    rows,
    columns,
    ONE_DECAY: tl.constexpr,
    TILED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One program BLOCK_COLUMNS columns of the state of a head of a sequence."""
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    heads = tl.num_programs(1)
    group = head % groups if TILED else head // (heads // groups)
    row = tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_row, is_column = row < rows, column < columns
    inside = is_row[:, None] & is_column[None, :]
    first = tl.load(query_starts + sequence).to(tl.int64)
    last = tl.load(query_starts + sequence + 1)
    states += tl.load(state_slots + sequence) * slot_stride + head * rows * columns
    places = states + row[:, None] * columns + column[None, :]
    state = tl.load(places, mask=inside, other=0.0)
    q += first * q_token + group * q_group + row
    k += first * k_token + group * k_group + row
    v += first * v_token + head * v_head + column
    decay += first * decay_token + head * decay_head
    if beta is not None:
        beta += first * beta_token + head
    output += (first * heads + head) * columns + column
    for _ in tl.range(first, last, num_stages=STAGES):
        query = tl.load(q, mask=is_row, other=0.0)
        key = tl.load(k, mask=is_row, other=0.0)
        change = tl.load(v, mask=is_column, other=0.0)
        if ONE_DECAY:
            state *= tl.exp(tl.load(decay))
        else:
            state *= tl.exp(tl.load(decay + row, mask=is_row, other=0.0))[:, None]
        if beta is not None:
            change = tl.load(beta) * (change - tl.sum(key[:, None] * state, axis=0))
            beta += beta_token
        state += key[:, None] * change[None, :]
        tl.store(output, tl.sum(query[:, None] * state, axis=0), mask=is_column)
        q += q_token
        k += k_token
        v += v_token
        decay += decay_token
        output += heads * columns
    tl.store(places, state, mask=inside)


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
    block_rows = triton.next_power_of_2(rows)
    block_columns = min(triton.next_power_of_2(columns), max(1, TILE // block_rows))
    output = torch.empty((tokens, heads, columns), dtype=torch.float32, device=v.device)
    delta_scan_kernel[(triton.cdiv(columns, block_columns), heads, len(state_slots))](
        q,
        k,
        v,
        decay,
        beta,
        states,
        state_slots,
        query_starts,
        output,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *decay.stride()[:2],
        0 if beta is None else beta.stride(0),
        states.stride(0),
        groups,
        rows,
        columns,
        ONE_DECAY=decay.shape[2] == 1,
        TILED=tiled,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        num_warps=1,
        enable_fp_fusion=True,
    )
    return output
