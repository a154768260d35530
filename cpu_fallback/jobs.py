"""A table of jobs, each a kernel over the rows of one weight, worked off by all threads in one parallel region.

A kernel is compiled machine code with the C signature `void (const int64 *job, int64 first_row, int64 last_row)`; its
job is a row of the table, the fields below. Threads take the next chunk of rows from a common counter, so a slow core
or a thread that lost its turn holds up nobody: with equal shares, one late thread delays every product of a model.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from trichord.cpu_fallback.jit import compile_address, compiled, threads
from trichord.cpu_fallback.vectors import I64, Emitter

_WORTH_WAKING = 1 << 18
"""Products of smaller jobs than this are done before other threads have woken, and depend on no scheduler."""

FIELDS = (
    "kernel",  # address of the machine code
    "rows",
    "chunk_rows",  # rows of one chunk, a thread's share at a time
    "weights",  # address of the packed rows
    "row_bytes",
    "columns",
    "y",  # address of the results
    "y_stride",  # elements from one row of the results to the next
    "tokens",  # rows of activations
    "x",  # address of the activations, each row padded to whole groups of 32
    "x_scales",  # address of float32: one scale for each group of 32 activations
    "x_sums",  # address of float32: the sum of each group
    "x_half_sums",  # address of float32: the sum of each half of a group
)


def compile_kernel(name: str, emit: Callable[[Emitter, dict[str, ir.Value], ir.Value, ir.Value], None]) -> int:
    """Address of a kernel: `emit` emits its body, given the job's fields and the first and the last row.

    The disk cache goes by the name, which must say all that `emit` depends on besides this package's sources.
    """

    @intrinsic
    def body(typing_context, job, first, last):  # type: ignore[no-untyped-def]
        def emit_body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            pointer, first, last = arguments
            triple, _, features = context.codegen().magic_tuple()
            fields = {field: builder.load(builder.gep(pointer, [I64(i)])) for i, field in enumerate(FIELDS)}
            emit(Emitter(builder, triple, features), fields, first, last)
            return context.get_dummy_value()

        return types.void(job, first, last), emit_body

    kernel = FunctionType(_kernel.__code__, {**globals(), "body": body}, name)
    kernel.__qualname__ = name
    return compile_address(kernel, "void(CPointer(int64), int64, int64)")


def _kernel(job, first, last):  # type: ignore[no-untyped-def]
    body(job, first, last)  # noqa: F821 - each kernel is this code with a body of its own


@intrinsic
def _take(typing_context, counter):  # type: ignore[no-untyped-def]
    """counter[0]++, atomically."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), emit


@intrinsic
def _call(typing_context, jobs, job, first, last):  # type: ignore[no-untyped-def]
    """Run the kernel of the table's row `job` over these rows of its weight."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        table, (_, job, first, last) = context.make_array(signature.args[0])(context, builder, arguments[0]), arguments
        row = builder.gep(table.data, [builder.mul(job, ir.Constant(job.type, len(FIELDS)))])
        integer = ir.IntType(64)
        kernel = ir.FunctionType(ir.VoidType(), [integer.as_pointer(), integer, integer])
        builder.call(builder.inttoptr(builder.load(row), kernel.as_pointer()), [row, first, last])
        return context.get_dummy_value()

    return types.void(jobs, types.int64, types.int64, types.int64), emit


@compiled
def _work(jobs, counter):  # type: ignore[no-untyped-def]
    while True:
        chunk, job = _take(counter), 0
        while job < len(jobs):
            rows, chunk_rows = jobs[job, 1], jobs[job, 2]
            chunks = (rows + chunk_rows - 1) // chunk_rows
            if chunk < chunks:
                break
            chunk -= chunks
            job += 1
        if job == len(jobs):
            break
        first = chunk * chunk_rows
        _call(jobs, job, first, min(first + chunk_rows, rows))


@compiled(parallel=True)
def _work_together(jobs, counter, workers):  # type: ignore[no-untyped-def]
    for _ in prange(workers):
        _work(jobs, counter)


def run(jobs: list[dict[str, int]]) -> None:
    """Work off the jobs, dictionaries of `FIELDS` (those a kernel does not read may be missing)."""
    table = np.array([job.get(field, 0) for job in jobs for field in FIELDS], np.int64).reshape(-1, len(FIELDS))
    counter = np.zeros(1, np.int64)
    if sum(job["rows"] * job["columns"] * job.get("tokens", 1) for job in jobs) < _WORTH_WAKING:
        _work(table, counter)
    else:
        _work_together(table, counter, threads())
