"""A table of jobs, each a kernel over the rows of one weight, worked off by all threads in one parallel region.

A kernel is compiled machine code with the C signature `void (const int64 *job, int64 first_row, int64 last_row)`; its
job is a row of the table, the fields below. Threads take the next chunk of rows from a common counter, so a slow core
or a thread that lost its turn holds up nobody: with equal shares, one late thread delays every product of a model.
"""

from __future__ import annotations

from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from trichord.cpu_fallback.jit import compiled

FIELDS = (
    "kernel",  # address of the machine code
    "chunks",  # how many chunks of rows there are
    "chunk_rows",
    "rows",
    "weights",  # address of the packed rows
    "row_bytes",
    "columns",
    "y",  # address of the float32 results
    "y_stride",  # elements from one row of the results to the next
    "x",  # address of the activations, each row padded to whole groups of 32
    "x_scales",  # address of float32: one scale for each group of 32 activations
    "x_sums",  # address of float32: the sums of 16 activations each, scaled
)


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


@compiled(parallel=True)
def run(jobs, counter, workers):  # type: ignore[no-untyped-def]
    """Work off the table `jobs` (J, len(FIELDS)) int64 on `workers` threads; `counter` (1,) int64 starts at 0."""
    for _ in prange(workers):
        while True:
            chunk, job = _take(counter), 0
            while job < len(jobs) and chunk >= jobs[job, 1]:
                chunk -= jobs[job, 1]
                job += 1
            if job == len(jobs):
                break
            first = chunk * jobs[job, 2]
            _call(jobs, job, first, min(first + jobs[job, 2], jobs[job, 3]))
