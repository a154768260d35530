"""What happens to each token by itself, in Numba: norms, rotary embedding with the cache write, activations.

A kernel's body works on the rows first <= row < last. It finds a call's tensors as addresses (0: none), strides in
elements and shapes in a record.
"""

from __future__ import annotations

import functools
from array import array
from struct import Struct
from types import FunctionType

import numpy as np
from numba import carray

from trichord.cpu_fallback.jit import Compiled, compiled
from trichord.cpu_fallback.jobs import FIELDS, Job, kernel_address, recording, run
from trichord.cpu_fallback.native import exp, floats, from_half, halves, long_integers, pointer, signed_bytes, to_half

_X = FIELDS.index("x")  # where a job has its record's address
_WORTH_HELP = 1 << 16
"""Numbers from which on threads save more than it costs to tell them."""
_PRODUCTS = 4  # that `jobs` counts, and that take about as long as a number
_CHUNK_NUMBERS = 1 << 14
"""Numbers a thread takes at a time: some 10 microseconds of work."""


def _record(names: str, **others: type) -> np.dtype:
    return np.dtype([*((name, np.int64) for name in names.split()), *others.items()], align=True)


_NORM = _record(
    "residual token_stride head_stride delta delta_token_stride delta_head_stride gain gain_lines bias bias_lines "
    "output heads width centered",
    epsilon=np.float64,
)
_ROTARY = _record(
    "q q_token q_head k k_token k_head v v_token v_head cos sin key_cache value_cache key_scales value_scales slots "
    "heads kv_heads size value_size pairs page itemsize interleaved"
)
_ACTIVATION = _record("gate gate_stride up up_stride output width")


class Kernel:
    """A body, compiled for the address of a record and the first and the last row."""

    def __init__(self, body: Compiled, record: np.dtype) -> None:
        self._body = body
        self._struct = Struct("".join("d" if record[index].kind == "f" else "q" for index in range(len(record))))

    def __call__(self, rows: int, width: int, *fields: float) -> None:
        """Works on all rows, of `width` numbers each, given the record's fields; on threads where that is worth it."""
        record = array("b", self._struct.pack(*fields))
        place = record.buffer_info()[0]
        if rows * width < _WORTH_HELP and not recording():
            self._body(place, 0, rows)
            return
        run([Job(self._address, rows, max(1, _CHUNK_NUMBERS // width), _PRODUCTS * width, x=place)], record)

    @functools.cached_property
    def _address(self) -> int:
        kernel = _copy(_work, f"work_{self._body.__name__}", body=self._body)
        return kernel_address(kernel)


def _work(job, first, last):  # type: ignore[no-untyped-def]
    body(carray(job, len(FIELDS))[_X], first, last)  # noqa: F821 - each kernel is this code with a body of its own


def _copy(function: FunctionType, name: str, **names: Compiled) -> FunctionType:
    """The function with these globals as well."""
    copy = FunctionType(function.__code__, {**globals(), **names}, name)
    copy.__qualname__ = name
    return copy


# Norm


@compiled
def _normalize(record, first, last):  # type: ignore[no-untyped-def]
    """A row is a head of a token."""
    problem = carray(pointer(record), 1, _NORM)[0]
    width = problem.width
    for row in range(first, last):
        token, head = row // problem.heads, row % problem.heads
        place = 4 * (token * problem.token_stride + head * problem.head_stride)
        delta = 4 * (token * problem.delta_token_stride + head * problem.delta_head_stride)
        _normalize_row(
            floats(problem.residual + place, width),
            floats(problem.delta + delta, width if problem.delta else 0),
            floats(problem.gain + 4 * (row % problem.gain_lines) * width, width if problem.gain else 0),
            floats(problem.bias + 4 * (row % problem.bias_lines) * width, width if problem.bias else 0),
            floats(problem.output + 4 * row * width, width),
            problem.centered,
            problem.epsilon,
        )


@compiled(fastmath={"reassoc", "contract"})
def _normalize_row(row, delta, gain, bias, normal, centered, epsilon):  # type: ignore[no-untyped-def]
    """One row; delta, gain and bias are empty where there are none."""
    width = len(row)
    for column in range(len(delta)):
        row[column] += delta[column]
    mean = np.float32(0.0)
    if centered:
        total = 0.0
        for column in range(width):
            total += np.float64(row[column])
        mean = np.float32(total / width)
    squares = 0.0
    for column in range(width):
        difference = np.float64(row[column] - mean)
        squares += difference * difference
    scale = np.float32(1.0 / np.sqrt(squares / width + epsilon))
    for column in range(width):
        number = (row[column] - mean) * scale
        if len(gain):
            number *= gain[column]
        if len(bias):
            number += bias[column]
        normal[column] = number


normalize = Kernel(_normalize, _NORM)

# Activation


def _activate(record, first, last):  # type: ignore[no-untyped-def]
    """`activation` and `factor` are globals of each activation's copy."""
    problem = carray(pointer(record), 1, _ACTIVATION)[0]
    width = problem.width
    for row in range(first, last):
        gate = floats(problem.gate + 4 * row * problem.gate_stride, width)
        product = floats(problem.output + 4 * row * width, width)
        if problem.up:
            up = floats(problem.up + 4 * row * problem.up_stride, width)
            for column in range(width):
                product[column] = activation(gate[column]) * factor(up[column])  # noqa: F821
        else:
            for column in range(width):
                product[column] = activation(gate[column])  # noqa: F821


@compiled
def _factor(up):  # type: ignore[no-untyped-def]
    return up


@compiled
def _clipped_factor(up):  # type: ignore[no-untyped-def]
    return min(max(up, np.float32(-7.0)), np.float32(7.0)) + np.float32(1.0)


@compiled
def _silu(x):  # type: ignore[no-untyped-def]
    return x / (np.float32(1.0) + exp(-x))


@compiled
def _clipped_silu(x):  # type: ignore[no-untyped-def]
    x = min(x, np.float32(7.0))
    return x / (np.float32(1.0) + exp(np.float32(-1.702) * x))


@compiled
def _power_of_two(exponent):  # type: ignore[no-untyped-def]
    """2 to a float64 power <= 0, as float32; 0 where that is subnormal."""
    exponent = max(exponent, -200.0)
    whole = np.floor(exponent)
    bits = np.int32((np.int32(max(whole, -127.0)) + np.int32(127)) << np.int32(23))
    return exp(np.float32((exponent - whole) * 0.6931471805599453)) * bits.view(np.float32)


@compiled(fastmath={"contract"})
def _gelu(x):  # type: ignore[no-untyped-def]
    """x sigmoid(2 z), which is x (1 + tanh(z)) / 2 without its cancellation, z = sqrt(2 / pi) (x + 0.044715 x³).

    The exponent is computed in float64: its error is the relative error of the tail.
    """
    a = np.float64(abs(x))
    e = _power_of_two(-2.302208198144325 * a * (1.0 + 0.044715 * a * a))  # log2(e) sqrt(8 / pi)
    return x * (e if x < np.float32(0.0) else np.float32(1.0)) / (np.float32(1.0) + e)


@compiled(fastmath={"contract"})
def _gelu_erf(x):  # type: ignore[no-untyped-def]
    """x Phi(x), Phi the normal distribution, from its tail on the side of x.

    1 - Phi(a) = exp(-a²/2) t P(t), t = 1 / (1 + 0.35 a), with P fitted to 3e-8, relative, on 0 <= a <= 14.
    """
    a = abs(x)
    t = np.float32(1.0) / (np.float32(1.0) + np.float32(0.35) * a)
    p = np.float32(-0.02914594)
    p = p * t + np.float32(0.14397174)
    p = p * t + np.float32(-0.25571433)
    p = p * t + np.float32(0.15917426)
    p = p * t + np.float32(-0.023109902)
    p = p * t + np.float32(0.10550803)
    p = p * t + np.float32(0.11983286)
    p = p * t + np.float32(0.13986187)
    p = p * t + np.float32(0.1396214)
    wide = np.float64(a)
    tail = p * t * _power_of_two(-0.7213475204444817 * wide * wide)  # log2(e) / 2
    return x * (tail if x < np.float32(0.0) else np.float32(1.0) - tail)


@compiled
def _relu(x):  # type: ignore[no-untyped-def]
    return max(x, np.float32(0.0))


@compiled
def _relu_squared(x):  # type: ignore[no-untyped-def]
    return _relu(x) * _relu(x)


ACTIVATIONS = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_erf": _gelu_erf,
    "relu": _relu,
    "relu_squared": _relu_squared,
    "swiglu_oai": _clipped_silu,
}
"""Functions of one float32 number, by their names in `trichord.dispatch.Activation`."""


@functools.cache
def activation_kernel(name: str) -> Kernel:
    """The kernel of an activation."""
    parts = {"activation": ACTIVATIONS[name], "factor": _clipped_factor if name == "swiglu_oai" else _factor}
    return Kernel(compiled(_copy(_activate, f"activate_{name}", **parts)), _ACTIVATION)


# Rotary embedding


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
def _store(source, cache, scales, row, itemsize):  # type: ignore[no-untyped-def]
    """A head's numbers to the row of a cache, and of its scales where numbers have one byte."""
    size = len(source)
    if itemsize == 1:
        groups = (size + 31) // 32
        _store_bytes(source, signed_bytes(cache + row * size, size), halves(scales + 2 * row * groups, groups))
    elif itemsize == 2:
        target = halves(cache + 2 * row * size, size)
        for column in range(size):
            target[column] = to_half(source[column])
    else:
        numbers = floats(cache + 4 * row * size, size)
        for column in range(size):
            numbers[column] = source[column]


@compiled
def _store_bytes(source, target, scales):  # type: ignore[no-untyped-def]
    """Groups of 32 as multiples of a scale: the largest magnitude over 127, NaN where one is."""
    size, most = len(source), np.float32(127.0)
    for group in range(len(scales)):
        first, last = 32 * group, min(32 * group + 32, size)
        largest = np.uint32(0)  # bits are in the order of magnitudes, NaN above all
        for column in range(first, last):
            bits = np.float32(source[column]).view(np.uint32) & np.uint32(0x7FFFFFFF)
            largest = bits if bits > largest else largest
        scales[group] = to_half(np.uint32(largest).view(np.float32) / most)
        scale = from_half(scales[group])
        inverse = np.float32(1.0) / scale if scale > 0 else np.float32(0.0)
        for column in range(first, last):
            number = np.rint(source[column] * inverse)
            number = number if number < most else most  # of a scale that was rounded to too little, or of NaN
            target[column] = np.int8(number if number > -most else -most)


@compiled
def _rotate_and_store(record, first, last):  # type: ignore[no-untyped-def]
    """A row is a token: its queries turn in place, its keys on their way to the cache."""
    problem = carray(pointer(record), 1, _ROTARY)[0]
    heads, kv_heads, size, pairs = problem.heads, problem.kv_heads, problem.size, problem.pairs
    key = np.empty(size, np.float32)
    for token in range(first, last):
        cos, sin = floats(problem.cos + 4 * token * pairs, pairs), floats(problem.sin + 4 * token * pairs, pairs)
        for head in range(heads):
            query = floats(problem.q + 4 * (token * problem.q_token + head * problem.q_head), size)
            _rotate(query, query, cos, sin, problem.interleaved)
        page_index, offset = divmod(long_integers(problem.slots, token + 1)[token], problem.page)
        for head in range(kv_heads):
            row = (page_index * kv_heads + head) * problem.page + offset
            source = floats(problem.k + 4 * (token * problem.k_token + head * problem.k_head), size)
            for column in range(2 * pairs, size):
                key[column] = source[column]
            _rotate(source, key, cos, sin, problem.interleaved)
            _store(key, problem.key_cache, problem.key_scales, row, problem.itemsize)
            if problem.v:
                value = floats(problem.v + 4 * (token * problem.v_token + head * problem.v_head), problem.value_size)
                _store(value, problem.value_cache, problem.value_scales, row, problem.itemsize)


rotate_and_store = Kernel(_rotate_and_store, _ROTARY)
