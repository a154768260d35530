"""What happens to each token by itself, in Numba: RMS norm, rotary embedding with the cache write, SwiGLU.

Every kernel works on the tokens first <= token < last, its `..._everywhere` on all of them in threads. Tensors come as
addresses and strides (see `native`), in elements.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from trichord.cpu_fallback.jit import compiled, threads
from trichord.cpu_fallback.native import exp, floats, halves, long_integers, to_half

WORTH_THREADS = 1 << 16
"""Numbers from which on waking the threads, some microseconds, costs less than it saves."""


def over_tokens(kernel, everywhere, tokens, width, *arguments):  # type: ignore[no-untyped-def]
    """Runs a kernel over all tokens, of `width` numbers each, on as many threads as that is worth."""
    if tokens * width < WORTH_THREADS:
        kernel(*arguments, 0, tokens)
    else:
        everywhere(*arguments, tokens, threads())


@compiled(fastmath={"reassoc", "contract"})
def normalize(tensors, epsilon, first, last):  # type: ignore[no-untyped-def]
    """tensors: residual, its stride, delta (0: none), its stride, gain, output, width."""
    residual, residual_stride, delta, delta_stride, gain, output, width = tensors
    gains = floats(gain, width)
    for token in range(first, last):
        row = floats(residual + 4 * token * residual_stride, width)
        if delta:
            added = floats(delta + 4 * token * delta_stride, width)
            for column in range(width):
                row[column] += added[column]
        squares = 0.0
        for column in range(width):
            squares += np.float64(row[column]) * np.float64(row[column])
        scale = np.float32(1.0 / np.sqrt(squares / width + epsilon))
        normal = floats(output + 4 * token * width, width)
        for column in range(width):
            normal[column] = row[column] * scale * gains[column]


@compiled(parallel=True)
def normalize_everywhere(tensors, epsilon, tokens, workers):  # type: ignore[no-untyped-def]
    """All tokens, on `workers` threads."""
    for worker in prange(workers):
        normalize(tensors, epsilon, tokens * worker // workers, tokens * (worker + 1) // workers)


@compiled
def gate_up(tensors, first, last):  # type: ignore[no-untyped-def]
    """tensors: gate, its stride, up, its stride, output, width."""
    gate, gate_stride, up, up_stride, output, width = tensors
    for token in range(first, last):
        gates, ups = floats(gate + 4 * token * gate_stride, width), floats(up + 4 * token * up_stride, width)
        product = floats(output + 4 * token * width, width)
        for column in range(width):
            product[column] = gates[column] / (np.float32(1.0) + exp(-gates[column])) * ups[column]


@compiled(parallel=True)
def gate_up_everywhere(tensors, tokens, workers):  # type: ignore[no-untyped-def]
    """All tokens, on `workers` threads."""
    for worker in prange(workers):
        gate_up(tensors, tokens * worker // workers, tokens * (worker + 1) // workers)


@compiled
def _rotate(source, target, cos, sin, interleaved):  # type: ignore[no-untyped-def]
    pairs = len(cos)
    for pair in range(pairs):
        left = 2 * pair if interleaved else pair
        right = left + 1 if interleaved else left + pairs
        a, b = source[left], source[right]
        target[left] = a * cos[pair] - b * sin[pair]
        target[right] = a * sin[pair] + b * cos[pair]


@compiled
def _store(source, cache, row, is_half):  # type: ignore[no-untyped-def]
    """A head's numbers to the row of a cache."""
    size = len(source)
    if is_half:
        target = halves(cache + 2 * row * size, size)
        for column in range(size):
            target[column] = to_half(source[column])
    else:
        numbers = floats(cache + 4 * row * size, size)
        for column in range(size):
            numbers[column] = source[column]


@compiled
def rotate(tensors, strides, geometry, first, last):  # type: ignore[no-untyped-def]
    """tensors: q, k, v, cos, sin, key_cache, value_cache, slots; strides: of the tokens and heads of q, k, v.

    geometry: query heads, key-value heads, head size, value size, pairs, page, whether the caches are of float16,
    whether pairs are interleaved.
    """
    q, k, v, cos, sin, key_cache, value_cache, slots = tensors
    q_token, q_head, k_token, k_head, v_token, v_head = strides
    heads, kv_heads, size, value_size, pairs, page, is_half, interleaved = geometry
    key = np.empty(size, np.float32)
    for token in range(first, last):
        token_cos, token_sin = floats(cos + 4 * token * pairs, pairs), floats(sin + 4 * token * pairs, pairs)
        for head in range(heads):
            query = floats(q + 4 * (token * q_token + head * q_head), size)
            _rotate(query, query, token_cos, token_sin, interleaved)
        page_index, offset = divmod(long_integers(slots, token + 1)[token], page)
        for head in range(kv_heads):
            row = (page_index * kv_heads + head) * page + offset
            source = floats(k + 4 * (token * k_token + head * k_head), size)
            for column in range(2 * pairs, size):
                key[column] = source[column]
            _rotate(source, key, token_cos, token_sin, interleaved)
            _store(key, key_cache, row, is_half)
            _store(floats(v + 4 * (token * v_token + head * v_head), value_size), value_cache, row, is_half)


@compiled(parallel=True)
def rotate_everywhere(tensors, strides, geometry, tokens, workers):  # type: ignore[no-untyped-def]
    """All tokens, on `workers` threads."""
    for worker in prange(workers):
        rotate(tensors, strides, geometry, tokens * worker // workers, tokens * (worker + 1) // workers)
