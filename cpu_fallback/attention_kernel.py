"""Flash attention over the paged cache in Numba: prompt chunks and single tokens by one kernel.

A task is a tile of queries of one key-value head: rows (token, query head of its group), so that the head's keys and
values are read once for all of them. It walks the pages of the context with a running maximum and sum of the softmax
(online softmax: Milakov and Gimelshein, 2018). Where tasks are fewer than threads, as for single tokens, each context
is split among several and their results are combined (flash decoding: Dao et al., 2023). With a window the walk starts
at the first position that a query of the tile sees.

As `attention_pages` transposes the keys, scores and means are the same product: a few rows of numbers times many rows
of vectors, whose sums stay in registers.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import carray, types
from numba.extending import intrinsic

from trichord.cpu_fallback.activations import panel_rows
from trichord.cpu_fallback.attention_pages import GROUP, load_keys, load_values
from trichord.cpu_fallback.attention_scores import cap, soften, tilt
from trichord.cpu_fallback.jit import compiled, threads
from trichord.cpu_fallback.jobs import FIELDS, Job, kernel_address, run
from trichord.cpu_fallback.native import emitter_for, exp, floats, integers, pointer
from trichord.cpu_fallback.vectors import F32, I8, I64, Vector

TILE = 32
"""Rows of a task: its queries, scores and means, and a page of keys and values, together fit the second-level cache."""

ROWS, COLUMNS = 4, 2 * panel_rows()
"""A product's sums in registers: eight vectors hide the latency of the multiply-add."""

_X = FIELDS.index("x")  # where a job says what its kernel works on
_ADDRESSES = "q", "key_cache", "value_cache", "page_tables", "query_starts", "context_lengths", "output", "states"
_OPTIONAL = "sinks", "slopes", "key_scales", "value_scales"
_GEOMETRY = "max_pages", "tiles", "group", "kv_heads", "size", "value_size", "page", "itemsize", "splits", "rows"
_STRIDES = "token_stride", "head_stride", "value_stride"
_MASK = "causal", "window", "chunked"
PROBLEM = np.dtype(
    [
        *((name, np.int64) for name in (*_ADDRESSES, *_OPTIONAL, *_GEOMETRY, *_STRIDES, *_MASK)),
        ("scale", np.float32),
        ("soft_cap", np.float32),
    ],
    align=True,
)
"""A call of `attention.attention`: its tensors' addresses (0 for none), the shapes, strides in elements, the variant.

`tiles` is how many a sequence may have, `splits` among how many tasks a context is divided. Where these are several,
each task leaves its state (see `_attend_tile`) at `states`, one after the other; a state has `rows` rows.
"""


@intrinsic
def _add_products(typing_context, sums, sums_stride, factors, factors_stride, vectors, vectors_stride, count):  # type: ignore[no-untyped-def]
    """sums[:ROWS, :COLUMNS] += factors[:ROWS, :count] @ vectors[:count, :COLUMNS]: addresses, strides in bytes."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        emitter = emitter_for(context, builder)
        sums, sums_stride, factors, factors_stride, vectors, vectors_stride, count = arguments
        sums, factors, vectors = (builder.inttoptr(a, I8.as_pointer()) for a in (sums, factors, vectors))
        lanes = emitter.lanes
        parts = range(0, 4 * COLUMNS, 4 * lanes)
        places = [
            [emitter.move(emitter.move(sums, builder.mul(sums_stride, I64(row))), part) for part in parts]
            for row in range(ROWS)
        ]
        variables = [[emitter.variable(emitter.load(place, F32, lanes)) for place in row] for row in places]
        with emitter.loop(I64(0), count) as index:
            vector = emitter.move(vectors, builder.mul(index, vectors_stride))
            loaded = [emitter.load(emitter.move(vector, part), F32, lanes) for part in parts]
            factor = emitter.move(factors, builder.mul(index, I64(4)))
            for row, row_variables in enumerate(variables):
                scalar = emitter.load(emitter.move(factor, builder.mul(factors_stride, I64(row))), F32)
                for variable, part in zip(row_variables, loaded, strict=True):
                    total = Vector(emitter, builder.load(variable))
                    builder.store(emitter.multiply_add(scalar, part, total).value, variable)
        for row_places, row_variables in zip(places, variables, strict=True):
            for place, variable in zip(row_places, row_variables, strict=True):
                emitter.store(Vector(emitter, builder.load(variable)), place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), emit


@compiled
def _product(sums, factors, vectors, rows, columns, count):  # type: ignore[no-untyped-def]
    """sums += factors[:, :count] @ vectors[:count], in blocks that cover the first `rows` and `columns` of sums."""
    for row in range(0, rows, ROWS):
        for column in range(0, columns, COLUMNS):
            _add_products(
                sums.ctypes.data + row * sums.strides[0] + column * 4,
                sums.strides[0],
                factors.ctypes.data + row * factors.strides[0],
                factors.strides[0],
                vectors.ctypes.data + column * 4,
                vectors.strides[0],
                count,
            )


@compiled
def _seen(problem, position, length):  # type: ignore[no-untyped-def]
    """What a query at this position sees: the first position, and one past the last."""
    stop = position + 1 if problem.causal else length
    if problem.window == 0:
        return np.int64(0), stop
    if problem.chunked:
        return position // problem.window * problem.window, stop
    return max(np.int64(0), position - problem.window + 1), stop


@compiled
def _attend_tile(problem, task, state):  # type: ignore[no-untyped-def]
    """A task's rows over its pages. Row r of `state` becomes (sums of weighted values ..., maximum, sum of weights)."""
    sequence, kv_head, split, first_row, rows, first_token, first_position, length, first_page, last_page = task
    group, size, value_size, page = problem.group, problem.size, problem.value_size, problem.page
    itemsize, scale = problem.itemsize, problem.scale
    key_scales, value_scales = -(-size // GROUP), -(-value_size // GROUP)  # of a row
    queries = np.zeros((state.shape[0], size), np.float32)
    columns = (page + COLUMNS - 1) // COLUMNS * COLUMNS
    scores = np.empty((state.shape[0], columns), np.float32)
    keys = np.empty((size, columns), np.float32)
    values = np.zeros((page, state.shape[1] - 2), np.float32)
    for row in range(rows):
        token, head = first_token + (first_row + row) // group, kv_head * group + (first_row + row) % group
        query = floats(problem.q + 4 * (token * problem.token_stride + head * problem.head_stride), size)
        for column in range(size):
            queries[row, column] = query[column] * scale
    maximum, total = state.shape[1] - 2, state.shape[1] - 1
    state.fill(0.0)
    for row in range(rows):
        state[row, maximum] = -1e30  # finite: a row that sees no key of a page must not give NaN
        if problem.sinks != 0 and split == 0:  # a sink is a score that was met before the first key
            head = kv_head * group + (first_row + row) % group
            state[row, maximum] = max(np.float32(-1e30), floats(problem.sinks + 4 * head, 1)[0])
            state[row, total] = 1.0
    table = integers(problem.page_tables + 4 * sequence * problem.max_pages, problem.max_pages)
    lowest = _seen(problem, first_position + first_row // group, length)[0]
    highest = _seen(problem, first_position + (first_row + rows - 1) // group, length)[1]
    for index in range(first_page, last_page):
        start = index * page
        place = (np.int64(table[index]) * problem.kv_heads + kv_head) * page
        least, most = max(0, lowest - start), min(page, highest - start)  # keys of this page that the tile sees
        skipped = least // COLUMNS * COLUMNS
        ahead = (np.int64(table[min(index + 1, last_page - 1)]) * problem.kv_heads + kv_head) * page
        key_address = problem.key_cache + (place + skipped) * size * itemsize
        scale_address = problem.key_scales + (place + skipped) * key_scales * 2
        next_keys = problem.key_cache + ahead * size * itemsize
        load_keys(keys[:, skipped:], key_address, scale_address, itemsize, most - skipped, next_keys)
        scores.fill(0.0)
        _product(scores[:, skipped:], queries, keys[:, skipped:], rows, most - skipped, size)
        for row in range(rows):
            position = first_position + (first_row + row) // group
            low, high = _seen(problem, position, length)
            low = min(max(low - start, 0), page)
            high = max(min(high - start, page), low)
            scores[row, :low] = 0.0
            scores[row, high:] = 0.0
            seen = scores[row, low:high]
            if problem.soft_cap != 0.0:
                cap(seen, problem.soft_cap)
            if problem.slopes != 0:
                head = kv_head * group + (first_row + row) % group
                tilt(seen, floats(problem.slopes + 4 * head, 1)[0], start + low - position)
            largest, added = soften(seen, state[row, maximum])
            if largest > state[row, maximum]:
                decay = exp(state[row, maximum] - largest)
                for column in range(state.shape[1]):
                    state[row, column] *= decay
                state[row, maximum] = largest
            state[row, total] += added
        stride = problem.value_stride
        value_address = problem.value_cache + (place + least) * stride * itemsize
        scale_address = problem.value_scales + (place + least) * value_scales * 2
        next_values = problem.value_cache + ahead * stride * itemsize
        load_values(values, value_address, scale_address, itemsize, value_size, stride, most - least, next_values)
        _product(state, scores[:, least:], values, rows, value_size, most - least)


@compiled
def _write(problem, task, state):  # type: ignore[no-untyped-def]
    """A task's means to the output."""
    _, kv_head, _, first_row, rows, first_token, _, _, _, _ = task
    group, value_size = problem.group, problem.value_size
    for row in range(rows):
        token, head = first_token + (first_row + row) // group, kv_head * group + (first_row + row) % group
        place = (token * problem.kv_heads * group + head) * value_size
        mean = floats(problem.output + 4 * place, value_size)
        for column in range(value_size):
            mean[column] = state[row, column] / state[row, state.shape[1] - 1]


@compiled
def _task(problem, index):  # type: ignore[no-untyped-def]
    """What task number `index` comprises; no rows where its sequence has no such tile."""
    index, split = index // problem.splits, index % problem.splits
    index, kv_head = index // problem.kv_heads, index % problem.kv_heads
    sequence, first_row = index // problem.tiles, index % problem.tiles * TILE
    starts = integers(problem.query_starts + 4 * sequence, 2)
    first_token, tokens = np.int64(starts[0]), np.int64(starts[1]) - np.int64(starts[0])
    rows = min(TILE, tokens * problem.group - first_row)
    length = np.int64(integers(problem.context_lengths + 4 * sequence, 1)[0])
    first_position = length - tokens
    lowest = _seen(problem, first_position + first_row // problem.group, length)[0]
    highest = _seen(problem, first_position + (first_row + rows - 1) // problem.group, length)[1]
    first_page = lowest // problem.page
    pages = (highest - 1) // problem.page + 1 - first_page
    last_page = first_page + pages * (split + 1) // problem.splits
    first_page += pages * split // problem.splits
    return sequence, kv_head, split, first_row, rows, first_token, first_position, length, first_page, last_page


@compiled
def _state(problem, index):  # type: ignore[no-untyped-def]
    """Where the task's state lives."""
    columns = -(-problem.value_size // COLUMNS) * COLUMNS + 2
    if problem.splits == 1:
        return np.empty((problem.rows, columns), np.float32)
    return carray(pointer(problem.states + 4 * index * problem.rows * columns), (problem.rows, columns), np.float32)


@compiled
def _attend(problem, index):  # type: ignore[no-untyped-def]
    task = _task(problem, index)
    if task[4] > 0:
        state = _state(problem, index)
        _attend_tile(problem, task, state)
        if problem.splits == 1:
            _write(problem, task, state)


def _kernel(job, first, last):  # type: ignore[no-untyped-def]
    problem = carray(pointer(carray(job, len(FIELDS))[_X]), 1, PROBLEM)[0]
    for index in range(first, last):
        _attend(problem, index)


@compiled
def _merge(state, other):  # type: ignore[no-untyped-def]
    """Adds another split's state."""
    maximum = state.shape[1] - 2
    for row in range(state.shape[0]):
        largest = max(state[row, maximum], other[row, maximum])
        decay, other_decay = exp(state[row, maximum] - largest), exp(other[row, maximum] - largest)
        for column in range(state.shape[1]):
            state[row, column] = state[row, column] * decay + other[row, column] * other_decay
        state[row, maximum] = largest


def _combine(job, first, last):  # type: ignore[no-untyped-def]
    """The states of each context's splits, to the output."""
    problem = carray(pointer(carray(job, len(FIELDS))[_X]), 1, PROBLEM)[0]
    for context in range(first, last):
        index = context * problem.splits
        task = _task(problem, index)
        if task[4] > 0:
            state = _state(problem, index)
            for other in range(index + 1, index + problem.splits):
                _merge(state, _state(problem, other))
            _write(problem, task, state)


_address = functools.cache(kernel_address)


def attend(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lengths: torch.Tensor,
    output: torch.Tensor,
    max_query: int,
    scale: float,
    causal: bool,
    window: int,
    chunked: bool,
    soft_cap: float,
    sinks: torch.Tensor | None,
    slopes: torch.Tensor | None,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> None:
    """`attention.attention`, to `output`. Contexts are split where there are fewer tasks than two a thread."""
    _, heads, size = q.shape
    _, kv_heads, page, value_size = value_cache.shape
    sequences, max_pages = page_tables.shape
    group = heads // kv_heads
    tiles = -(-max_query * group // TILE)
    tasks = sequences * tiles * kv_heads
    pages = min(max_pages, (window + TILE) // page + 2) if window else max_pages  # that a task may walk
    wanted = 2 * threads()
    splits = 1 if tasks >= wanted else min(pages, -(-wanted // max(tasks, 1)))
    rows = -(-min(max_query * group, TILE) // ROWS) * ROWS
    columns = -(-value_size // COLUMNS) * COLUMNS + 2
    states = np.empty(0 if splits == 1 else tasks * splits * rows * columns, np.float32)
    tensors = q, key_cache, value_cache, page_tables, query_starts, context_lengths, output
    addresses = *(tensor.data_ptr() for tensor in tensors), states.ctypes.data
    optional = (0 if tensor is None else tensor.data_ptr() for tensor in (sinks, slopes, key_scales, value_scales))
    geometry = max_pages, tiles, group, kv_heads, size, value_size, page, key_cache.itemsize, splits, rows
    strides = q.stride(0), q.stride(1), value_cache.stride(2)
    problems = np.array(
        [(*addresses, *optional, *geometry, *strides, causal, window, chunked, scale, soft_cap)], PROBLEM
    )
    products = rows * pages * page * size // splits  # that a task takes, about
    run([Job(_address(_kernel), tasks * splits, 1, products, x=problems.ctypes.data)], problems, states)
    if splits > 1:
        run([Job(_address(_combine), tasks, tasks, rows * columns, x=problems.ctypes.data)])
