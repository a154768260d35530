"""Flash attention over the paged cache in Numba: prompt chunks and single tokens by one kernel.

A task is a tile of queries of one key-value head: rows (token, query head of its group), so that the head's keys and
values are read once for all of them. It walks the pages of the context with a running maximum and sum of the softmax
(online softmax: Milakov and Gimelshein, 2018). Where tasks are fewer than threads, as for single tokens, each context
is split among several and their results are combined (flash decoding: Dao et al., 2023).

Keys are transposed on their way out of the cache, so that scores and means are the same product: a few rows of numbers
times many rows of vectors, whose sums stay in registers.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from trichord.cpu_fallback.jit import compiled
from trichord.cpu_fallback.native import exp, floats, from_half, halves, integers
from trichord.cpu_fallback.vectors import F32, I8, I16, I64, Emitter, Vector

TILE = 32
"""Rows of a task: its queries, scores and means, and a page of keys and values, together fit the second-level cache."""

ROWS, COLUMNS = 4, 16
"""A product's sums in registers: eight vectors of eight hide the latency of the multiply-add."""


def _emitter(context, builder) -> Emitter:  # type: ignore[no-untyped-def]
    triple, _, features = context.codegen().magic_tuple()
    return Emitter(builder, triple, features)


@intrinsic
def _add_products(typing_context, sums, sums_stride, factors, factors_stride, vectors, vectors_stride, count):  # type: ignore[no-untyped-def]
    """sums[:4, :16] += factors[:4, :count] @ vectors[:count, :16], at these addresses, with strides in bytes."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        emitter = _emitter(context, builder)
        sums, sums_stride, factors, factors_stride, vectors, vectors_stride, count = arguments
        sums, factors, vectors = (builder.inttoptr(a, I8.as_pointer()) for a in (sums, factors, vectors))
        parts = range(0, 4 * COLUMNS, 32)
        places = [
            [emitter.move(emitter.move(sums, builder.mul(sums_stride, I64(row))), part) for part in parts]
            for row in range(ROWS)
        ]
        variables = [[emitter.variable(emitter.load(place, F32, 8)) for place in row] for row in places]
        with emitter.loop(I64(0), count) as index:
            vector = emitter.move(vectors, builder.mul(index, vectors_stride))
            loaded = [emitter.load(emitter.move(vector, part), F32, 8) for part in parts]
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


def _transposed(rows: list[Vector]) -> list[Vector]:
    """8 vectors of 8 lanes -> the vectors of their first lanes, second lanes, and so on, in three rounds of swaps."""
    for distance in (1, 2, 4):
        first = [lane if not lane & distance else lane + 8 - distance for lane in range(8)]
        second = [lane + distance if not lane & distance else lane + 8 for lane in range(8)]
        swapped = list(rows)
        for low in (row for row in range(8) if not row & distance):
            high = low + distance
            swapped[low], swapped[high] = rows[low].lanes(first, rows[high]), rows[low].lanes(second, rows[high])
        rows = swapped
    return rows


def _transpose_block(element: ir.Type):  # type: ignore[no-untyped-def]
    @intrinsic
    def transpose(typing_context, target, target_stride, source, source_stride):  # type: ignore[no-untyped-def]
        """8 x 8 numbers at `source` as float32, transposed, to `target`; addresses, strides in bytes."""

        def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            emitter = _emitter(context, builder)
            target, target_stride, source, source_stride = arguments
            target, source = (builder.inttoptr(a, I8.as_pointer()) for a in (target, source))
            rows = [
                emitter.load(emitter.move(source, builder.mul(source_stride, I64(row))), element, 8) for row in range(8)
            ]
            if element == I16:
                rows = [emitter.from_half(row) for row in rows]
            for column, vector in enumerate(_transposed(rows)):
                emitter.store(vector, emitter.move(target, builder.mul(target_stride, I64(column))))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), emit

    return transpose


_transpose_halves, _transpose_floats = _transpose_block(I16), _transpose_block(F32)


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
def _load_keys(target, address, is_half, count):  # type: ignore[no-untyped-def]
    """The first `count` keys of a page, transposed, to target (size, page); a few further ones may come along."""
    size, page = target.shape
    width = 2 if is_half else 4
    for column in range(0, size - 7, 8):
        for row in range(0, count, 8):
            place = target.ctypes.data + column * target.strides[0] + row * 4
            source = address + (row * size + column) * width
            if is_half:
                _transpose_halves(place, target.strides[0], source, size * width)
            else:
                _transpose_floats(place, target.strides[0], source, size * width)
    for column in range(size // 8 * 8, size):
        for row in range(count):
            if is_half:
                target[column, row] = from_half(halves(address, page * size)[row * size + column])
            else:
                target[column, row] = floats(address, page * size)[row * size + column]


@compiled
def _load_values(target, address, is_half, size, count):  # type: ignore[no-untyped-def]
    """The first `count` values (size) of a page to target (page, at least size)."""
    for row in range(count):
        if is_half:
            source = halves(address + row * size * 2, size)
            for column in range(size):
                target[row, column] = from_half(source[column])
        else:
            numbers = floats(address + row * size * 4, size)
            for column in range(size):
                target[row, column] = numbers[column]


@compiled(fastmath={"reassoc", "contract", "nnan", "nsz"})
def _soften(scores, count, largest):  # type: ignore[no-untyped-def]
    """The first `count` scores -> their exponentials below the new maximum, the others -> 0; (maximum, sum)."""
    for index in range(count):
        largest = max(largest, scores[index])
    total = np.float32(0.0)
    for index in range(count):
        weight = exp(scores[index] - largest)
        scores[index] = weight
        total += weight
    for index in range(count, len(scores)):
        scores[index] = 0.0
    return largest, total


@compiled
def _attend_tile(addresses, geometry, scale, task, state, scratch):  # type: ignore[no-untyped-def]
    """A task's rows over its pages, into `state`: weighted sums of values (R, Dv), the maxima (R,) and sums (R,)."""
    q, key_cache, value_cache, page_tables, _, _, _ = addresses
    _, max_pages, heads, kv_heads, size, value_size, page, is_half, token_stride, head_stride = geometry
    sequence, kv_head, first_row, rows, first_token, first_position, first_page, last_page = task
    sums, largest, total = state
    queries, scores, keys, values = scratch
    sums.fill(0.0)
    largest.fill(-1e30)
    total.fill(0.0)
    queries.fill(0.0)
    group = heads // kv_heads
    for row in range(rows):
        token, head = divmod(first_row + row, group)
        address = q + 4 * ((first_token + token) * token_stride + (kv_head * group + head) * head_stride)
        query = floats(address, size)
        for column in range(size):
            queries[row, column] = query[column] * scale
    table = integers(page_tables + 4 * sequence * max_pages, max_pages)
    width = 2 if is_half else 4
    for index in range(first_page, last_page):
        place = np.int64(table[index]) * kv_heads + kv_head
        visible = first_position - index * page + 1  # keys of this page that the sequence's first query sees
        most = min(page, visible + (first_row + rows - 1) // group)
        _load_keys(keys, key_cache + place * page * size * width, is_half, most)
        scores.fill(0.0)
        _product(scores, queries, keys, rows, most, size)
        for row in range(rows):
            count = max(0, min(page, visible + (first_row + row) // group))
            new_largest, added = _soften(scores[row], count, largest[row])
            if new_largest > largest[row]:
                decay = exp(largest[row] - new_largest)
                largest[row] = new_largest
                total[row] *= decay
                for column in range(sums.shape[1]):
                    sums[row, column] *= decay
            total[row] += added
        _load_values(values, value_cache + place * page * value_size * width, is_half, value_size, most)
        _product(sums, scores, values, rows, value_size, most)


@compiled
def _merge(state, other):  # type: ignore[no-untyped-def]
    """Adds the state of another split of the same context."""
    (sums, largest, total), (other_sums, other_largest, other_total) = state, other
    for row in range(len(total)):
        new_largest = max(largest[row], other_largest[row])
        decay, other_decay = exp(largest[row] - new_largest), exp(other_largest[row] - new_largest)
        largest[row] = new_largest
        total[row] = total[row] * decay + other_total[row] * other_decay
        for column in range(sums.shape[1]):
            sums[row, column] = sums[row, column] * decay + other_sums[row, column] * other_decay


@compiled
def _write(addresses, geometry, task, state):  # type: ignore[no-untyped-def]
    """A task's means to the output."""
    heads, kv_heads, value_size = geometry[2], geometry[3], geometry[5]
    _, kv_head, first_row, rows, first_token, _, _, _ = task
    sums, _, total = state
    group = heads // kv_heads
    for row in range(rows):
        token, head = divmod(first_row + row, group)
        place = ((first_token + token) * heads + kv_head * group + head) * value_size
        output = floats(addresses[6] + 4 * place, value_size)
        for column in range(value_size):
            output[column] = sums[row, column] / total[row]


@compiled
def _task(addresses, geometry, tiles, pair, split, splits):  # type: ignore[no-untyped-def]
    """What the split of a (tile, key-value head) comprises; tiles (S+1,) is how many precede each sequence's."""
    sequences, _, heads, kv_heads, _, _, page, _, _, _ = geometry
    starts = integers(addresses[4], sequences + 1)
    lengths = integers(addresses[5], sequences)
    tile, kv_head = divmod(pair, kv_heads)
    sequence = 0
    while tiles[sequence + 1] <= tile:
        sequence += 1
    group = heads // kv_heads
    tokens = np.int64(starts[sequence + 1] - starts[sequence])
    first_row = (tile - tiles[sequence]) * TILE
    rows = min(TILE, tokens * group - first_row)
    first_position = lengths[sequence] - tokens
    pages = (first_position + (first_row + rows - 1) // group) // page + 1
    first_page, last_page = pages * split // splits, pages * (split + 1) // splits
    return sequence, kv_head, first_row, rows, np.int64(starts[sequence]), first_position, first_page, last_page


@compiled
def _work(addresses, geometry, scale, tiles, states, splits, worker, workers):  # type: ignore[no-untyped-def]
    """Every workers-th task, from that of this number."""
    _, _, _, kv_heads, size, _, page, _, _, _ = geometry
    sums, largest, total = states
    rows, padded = sums.shape[1:]
    scratch = (
        np.empty((rows, size), np.float32),
        np.empty((rows, page), np.float32),
        np.empty((size, page), np.float32),
        np.zeros((page, padded), np.float32),
    )
    for index in range(worker, tiles[-1] * kv_heads * splits, workers):
        slot = worker if splits == 1 else index
        state = sums[slot], largest[slot], total[slot]
        task = _task(addresses, geometry, tiles, index // splits, index % splits, splits)
        _attend_tile(addresses, geometry, scale, task, state, scratch)
        if splits == 1:
            _write(addresses, geometry, task, state)


@compiled
def _combine(addresses, geometry, tiles, states, splits, pair):  # type: ignore[no-untyped-def]
    """The splits of a (tile, key-value head), to the output."""
    sums, largest, total = states
    first = pair * splits
    state = sums[first], largest[first], total[first]
    for slot in range(first + 1, first + splits):
        _merge(state, (sums[slot], largest[slot], total[slot]))
    _write(addresses, geometry, _task(addresses, geometry, tiles, pair, 0, splits), state)


@compiled(parallel=True)
def attend(addresses, geometry, max_query, scale, workers):  # type: ignore[no-untyped-def]
    """Causal attention on `workers` threads. Shapes and meaning as in `attention.attention`.

    addresses: q, key_cache, value_cache, page_tables, query_starts, context_lengths, output.
    geometry: sequences, max_pages, heads, kv_heads, head size, value size, page, whether the caches are of float16,
    and the strides of q, in elements, from one token and from one head to the next.
    """
    sequences, max_pages, heads, kv_heads, _, value_size, _, _, _, _ = geometry
    starts = integers(addresses[4], sequences + 1)
    group = heads // kv_heads
    tiles = np.zeros(sequences + 1, np.int64)
    for sequence in range(sequences):
        tokens = np.int64(starts[sequence + 1] - starts[sequence])
        tiles[sequence + 1] = tiles[sequence] + (tokens * group + TILE - 1) // TILE
    pairs = tiles[sequences] * kv_heads
    splits = 1 if pairs >= 2 * workers else min(max_pages, (2 * workers + pairs - 1) // max(pairs, 1))
    slots = workers if splits == 1 else pairs * splits  # without splits a state is finished before the next begins
    rows = (min(TILE, max_query * group) + ROWS - 1) // ROWS * ROWS
    states = (
        np.empty((slots, rows, (value_size + COLUMNS - 1) // COLUMNS * COLUMNS), np.float32),
        np.empty((slots, rows), np.float32),
        np.empty((slots, rows), np.float32),
    )
    for worker in prange(workers):
        _work(addresses, geometry, scale, tiles, states, splits, np.int64(worker), workers)
    if splits > 1:
        for pair in prange(pairs):
            _combine(addresses, geometry, tiles, states, splits, np.int64(pair))
