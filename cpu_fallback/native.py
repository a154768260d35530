"""What Numba's kernels lack: tensors by their address, half precision, and an exponential that vectorizes.

Kernels take addresses and strides as integers, not arrays: a NumPy view of a tensor costs microseconds and an address a
tenth of one, and one compiled kernel serves every stride.
"""

from __future__ import annotations

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from trichord.cpu_fallback.jit import compiled
from trichord.cpu_fallback.vectors import I64, Emitter, Vector


def emitter_for(context, builder) -> Emitter:  # type: ignore[no-untyped-def]
    """An emitter in an intrinsic's code, for the CPU that Numba compiles for."""
    triple, _, features = context.codegen().magic_tuple()
    return Emitter(builder, triple, features)


@intrinsic
def pointer(typing_context, address):  # type: ignore[no-untyped-def]
    """What `numba.carray` takes, from an address."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), emit


@intrinsic
def fetch(typing_context, address, size):  # type: ignore[no-untyped-def]
    """Start to bring so many bytes close; what is there already, and addresses of nothing, do no harm."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        emitter, (address, size) = emitter_for(context, builder), arguments
        with emitter.loop(I64(0), builder.udiv(builder.add(size, I64(63)), I64(64))) as line:
            emitter.prefetch(emitter.at(address, line, 64))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@compiled
def floats(address, count):  # type: ignore[no-untyped-def]
    """The float32 numbers at an address."""
    return carray(pointer(address), (count,), np.float32)


@compiled
def halves(address, count):  # type: ignore[no-untyped-def]
    """The bits of the float16 numbers at an address."""
    return carray(pointer(address), (count,), np.uint16)


@compiled
def signed_bytes(address, count):  # type: ignore[no-untyped-def]
    """The int8 numbers at an address."""
    return carray(pointer(address), (count,), np.int8)


@compiled
def integers(address, count):  # type: ignore[no-untyped-def]
    """The int32 numbers at an address."""
    return carray(pointer(address), (count,), np.int32)


@compiled
def long_integers(address, count):  # type: ignore[no-untyped-def]
    """The int64 numbers at an address."""
    return carray(pointer(address), (count,), np.int64)


@intrinsic
def from_half(typing_context, bits):  # type: ignore[no-untyped-def]
    """The float32 value of float16 bits (uint16): one instruction for eight of them where the CPU has F16C."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        emitter = emitter_for(context, builder)
        return emitter.from_half(Vector(emitter, arguments[0])).value

    return types.float32(types.uint16), emit


@compiled
def to_half(number):  # type: ignore[no-untyped-def]
    """The bits (uint16) of the float16 nearest to a float32, ties to even."""
    bits = np.float32(number).view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    if magnitude < np.uint32(0x38800000):  # below 2^-14: subnormal, whose unit is that of float32 numbers near 0.5
        half = np.float32(abs(number) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
    elif magnitude < np.uint32(0x47800000):  # below 2^16: round, then lower the exponent's bias by 112
        odd = (magnitude >> np.uint32(13)) & np.uint32(1)
        half = ((magnitude + np.uint32(0xFFF) + odd) >> np.uint32(13)) - np.uint32(112 << 10)
    else:
        half = np.uint32(0x7C00 if magnitude <= np.uint32(0x7F800000) else 0x7E00)
    return np.uint16(half | (bits >> np.uint32(16)) & np.uint32(0x8000))


@compiled(fastmath={"contract"})
def exp(x):  # type: ignore[no-untyped-def]
    """e to the x, float32, within 2 units in the last place; 0 below -87.6 and infinity above 88.3.

    2^n times a polynomial on [-ln 2 / 2, ln 2 / 2], the argument reduced in two parts (Cody and Waite, 1980); the
    coefficients are those of Cephes' expf. Without branches, so that loops over it vectorize.
    """
    x = min(max(x, np.float32(-88.0)), np.float32(89.0))
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = (x - n * np.float32(0.693359375)) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * (r * r) + r + np.float32(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
