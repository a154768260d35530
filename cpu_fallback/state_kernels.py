"""Recurrent layers in Numba: the short convolution, the selective scan, the delta rule.

What a state holds falls into parts that never meet: channels, rows or columns. These are the rows of a kernel (see
`token_kernels`): it takes its own of every sequence, whose tokens follow in order, and threads share the work evenly
whatever the lengths of the sequences.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from trichord.cpu_fallback.jit import compiled
from trichord.cpu_fallback.native import exp, floats, integers, long_integers, pointer
from trichord.cpu_fallback.token_kernels import Kernel

CHANNELS = 64
"""Channels of the convolution that make a part."""

ROWS = 16
"""Rows of the selective scan's states that make a part: their outputs fill a cache line."""

COLUMNS = 32
"""Columns of a head's state in the delta rule that make a part: with 128 rows they stay in the first-level cache."""


def _record(names: str) -> np.dtype:
    return np.dtype([(name, np.int64) for name in names.split()])


_BATCH = "states slot_stride state_slots query_starts sequences output "
_CONVOLUTION = _record(_BATCH + "x token_stride kernel bias channels width")
_STATE_SCAN = _record(
    _BATCH + "x x_token x_head steps step_token rates head_rates b b_token b_group c c_token c_group "
    "heads head_rows groups columns"
)
_DELTA_SCAN = _record(
    _BATCH + "q q_token q_group k k_token k_group v v_token v_head decay decay_token decay_head head_decays "
    "beta beta_token heads groups is_tiled rows columns"
)


@compiled
def _sequence(problem, index):  # type: ignore[no-untyped-def]
    """A sequence's first token, its end and the address of its state."""
    bounds = integers(problem.query_starts, index + 2)
    slot = long_integers(problem.state_slots, index + 1)[index]
    return np.int64(bounds[index]), np.int64(bounds[index + 1]), problem.states + 4 * slot * problem.slot_stride


# Convolution


@compiled
def _convolve(record, first, last):  # type: ignore[no-untyped-def]
    """A part is CHANNELS channels, fewer in the last."""
    problem = carray(pointer(record), 1, _CONVOLUTION)[0]
    past = problem.width - 1
    taps, history = np.empty((problem.width, CHANNELS), np.float32), np.empty((past, CHANNELS), np.float32)
    for part in range(first, last):
        channel = part * CHANNELS
        count = min(CHANNELS, problem.channels - channel)
        _transpose(problem.kernel + 4 * channel * problem.width, taps, count)
        for sequence in range(problem.sequences):
            start, end, states = _sequence(problem, sequence)
            state = states + 4 * channel * past
            _transpose(state, history, count)
            for token in range(start, end):
                y = floats(problem.output + 4 * (token * problem.channels + channel), count)
                if problem.bias:
                    y[:] = floats(problem.bias + 4 * channel, count)
                else:
                    y[:] = np.float32(0.0)
                for tap in range(problem.width):
                    _add_product(y, taps[tap], _input(problem, history, start, token - start + tap, channel))
            left = floats(state, count * past)
            for target in range(past):
                source = _input(problem, history, start, end - start + target, channel)
                for index in range(count):
                    left[index * past + target] = source[index]


@compiled
def _transpose(source, target, count):  # type: ignore[no-untyped-def]
    """(count, W) numbers at an address to the first columns of target (W, CHANNELS)."""
    width = len(target)
    numbers = floats(source, count * width)
    for row in range(width):
        for column in range(count):
            target[row, column] = numbers[column * width + row]


@compiled
def _input(problem, history, start, place, channel):  # type: ignore[no-untyped-def]
    """The inputs at a place among the state's and then the sequence's own, which begin at token `start`."""
    past = len(history)
    if place < past:
        return history[place]
    return floats(problem.x + 4 * ((start + place - past) * problem.token_stride + channel), CHANNELS)


@compiled(fastmath={"contract"})
def _add_product(y, factors, source):  # type: ignore[no-untyped-def]
    for index in range(len(y)):
        y[index] += factors[index] * source[index]


convolve = Kernel(_convolve, _CONVOLUTION)

# Selective scan


@compiled
def _scan_states(record, first, last):  # type: ignore[no-untyped-def]
    """A part is ROWS rows of the heads' states one after the other, fewer in the last."""
    problem = carray(pointer(record), 1, _STATE_SCAN)[0]
    columns, head_rows, head_rates = problem.columns, problem.head_rows, problem.head_rates
    rows, group_heads = problem.heads * head_rows, problem.heads // problem.groups
    for part in range(first, last):
        for sequence in range(problem.sequences):
            start, end, states = _sequence(problem, sequence)
            for token in range(start, end):
                x = floats(problem.x + 4 * token * problem.x_token, (problem.heads - 1) * problem.x_head + head_rows)
                steps = floats(problem.steps + 4 * token * problem.step_token, problem.heads)
                y = floats(problem.output + 4 * token * rows, rows)
                for row in range(part * ROWS, min((part + 1) * ROWS, rows)):
                    head = row // head_rows
                    group = head // group_heads
                    y[row] = _advance_row(
                        states + 4 * row * columns,
                        problem.rates + 4 * head * head_rates,
                        head_rates,
                        problem.b + 4 * (token * problem.b_token + group * problem.b_group),
                        problem.c + 4 * (token * problem.c_token + group * problem.c_group),
                        columns,
                        steps[head],
                        steps[head] * x[head * problem.x_head + row % head_rows],
                    )


# Addresses, not arrays: arrays are counted references, which would cost more than the row's arithmetic.
@compiled(fastmath={"reassoc", "contract"})
def _advance_row(state, rates, head_rates, b, c, columns, step, scaled):  # type: ignore[no-untyped-def]
    """One row of a state by one token, in place; returns its output."""
    numbers, decays = carray(pointer(state), (columns,), np.float32), carray(pointer(rates), (head_rates,), np.float32)
    inputs, outputs = carray(pointer(b), (columns,), np.float32), carray(pointer(c), (columns,), np.float32)
    total = np.float32(0.0)
    if head_rates == 1:
        factor = exp(step * decays[0])
        for column in range(columns):
            number = factor * numbers[column] + scaled * inputs[column]
            numbers[column] = number
            total += number * outputs[column]
    else:
        for column in range(columns):
            number = exp(step * decays[column]) * numbers[column] + scaled * inputs[column]
            numbers[column] = number
            total += number * outputs[column]
    return total


scan_states = Kernel(_scan_states, _STATE_SCAN)

# Delta rule


@compiled
def _scan_deltas(record, first, last):  # type: ignore[no-untyped-def]
    """A part is COLUMNS columns of a head's state, fewer in the head's last."""
    problem = carray(pointer(record), 1, _DELTA_SCAN)[0]
    rows, columns, heads, groups = problem.rows, problem.columns, problem.heads, problem.groups
    head_parts = (columns + COLUMNS - 1) // COLUMNS
    factors, change = np.empty(rows, np.float32), np.empty(COLUMNS, np.float32)
    for part in range(first, last):
        head, column = part // head_parts, part % head_parts * COLUMNS
        group = head % groups if problem.is_tiled else head // (heads // groups)
        for sequence in range(problem.sequences):
            start, end, states = _sequence(problem, sequence)
            for token in range(start, end):
                strength = np.float32(1.0)
                if problem.beta:
                    strength = floats(problem.beta + 4 * token * problem.beta_token, heads)[head]
                addresses = (
                    states + 4 * (head * rows * columns + column),
                    problem.q + 4 * (token * problem.q_token + group * problem.q_group),
                    problem.k + 4 * (token * problem.k_token + group * problem.k_group),
                    problem.v + 4 * (token * problem.v_token + head * problem.v_head + column),
                    problem.decay + 4 * (token * problem.decay_token + head * problem.decay_head),
                    problem.output + 4 * ((token * heads + head) * columns + column),
                    factors.ctypes.data,
                    change.ctypes.data,
                )
                shape = rows, min(COLUMNS, columns - column), columns, problem.head_decays
                _advance_columns(addresses, shape, problem.beta != 0, strength)


@compiled(fastmath={"contract"})
def _advance_columns(addresses, shape, is_delta, strength):  # type: ignore[no-untyped-def]
    """Some columns of a state by one token, in place.

    addresses: the state; query, key, value and decays; the output; room for a factor a row and a change a column.
    shape: rows, columns, elements from a row of the state to the next, decays.
    """
    state, query, key, value, decay, output, factor, change = addresses
    rows, columns, stride, head_decays = shape
    queries, keys = carray(pointer(query), (rows,), np.float32), carray(pointer(key), (rows,), np.float32)
    values, y = carray(pointer(value), (columns,), np.float32), carray(pointer(output), (columns,), np.float32)
    factors, changes = carray(pointer(factor), (rows,), np.float32), carray(pointer(change), (columns,), np.float32)
    decays = carray(pointer(decay), (head_decays,), np.float32)
    if head_decays == 1:
        shared = exp(decays[0])
        for row in range(rows):
            factors[row] = shared
    else:
        for row in range(rows):
            factors[row] = exp(decays[row])
    for column in range(columns):
        changes[column] = values[column]
        y[column] = np.float32(0.0)
    if is_delta:
        for row in range(rows):
            numbers, weight = (
                carray(pointer(state + 4 * row * stride), (columns,), np.float32),
                factors[row] * keys[row],
            )
            for column in range(columns):
                changes[column] -= weight * numbers[column]
        for column in range(columns):
            changes[column] *= strength
    for row in range(rows):
        numbers = carray(pointer(state + 4 * row * stride), (columns,), np.float32)
        kept, weight, read = factors[row], keys[row], queries[row]
        for column in range(columns):
            number = kept * numbers[column] + weight * changes[column]
            numbers[column] = number
            y[column] += read * number


scan_deltas = Kernel(_scan_deltas, _DELTA_SCAN)
