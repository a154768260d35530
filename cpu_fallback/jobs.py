"""A table of jobs, each a kernel over rows, and the threads that work it off.

A kernel is compiled machine code with the C signature `void (const int64 *job, int64 first_row, int64 last_row)`; its
job is a row of the table: the fields of `Job`.

The caller of `run` works itself. Helpers, threads that wait in machine code without the GIL, join when they notice: all
take the next chunk of rows from a common counter, and the caller waits at the end only for chunks in work, never for a
helper that has not come. So a slow core or a busy machine costs its share and no more; with the usual equal shares and
a barrier, each of the hundred products of a token would wait for the latest thread.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from trichord.cpu_fallback.jit import compile_address, compiled, threads
from trichord.cpu_fallback.native import pointer
from trichord.cpu_fallback.vectors import I64, Emitter

_WORTH_HELP = 1 << 18
"""Products of smaller jobs than this are done before a helper has come."""


class Job(NamedTuple):
    """A row of the table; a kernel reads the fields it needs."""

    kernel: int
    """Address of the machine code."""
    rows: int
    chunk_rows: int
    """Rows of one chunk, a thread's share at a time."""
    columns: int
    weights: int = 0
    """Address of the packed rows."""
    row_bytes: int = 0
    y: int = 0
    """Address of the results."""
    y_stride: int = 0
    """Elements from one row of the results to the next."""
    tokens: int = 0
    """Rows of activations."""
    pairs: int = 0
    """Address of int64: for each of these, its row in x and its row in y."""
    x: int = 0
    """Address of the activations, each row padded to whole groups of 32."""
    x_scales: int = 0
    """Address of float32: one scale for each group of 32 activations."""
    x_sums: int = 0
    """Address of float32: the sum of each group."""
    x_half_sums: int = 0
    """Address of float32: the sum of each half of a group."""


KERNEL_NAMES: dict[int, str] = {}
"""Of each kernel, by its address: for profiles."""
FIELDS = Job._fields
_ROWS, _CHUNK_ROWS, _COLUMNS, _TOKENS = map(FIELDS.index, ("rows", "chunk_rows", "columns", "tokens"))


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
    return kernel_address(kernel)


def kernel_address(function: FunctionType) -> int:
    """Address of a kernel: the function, of a job's address and the first and the last row, compiled."""
    address = compile_address(function, "void(CPointer(int64), int64, int64)")
    KERNEL_NAMES[address] = function.__qualname__
    return address


def _kernel(job, first, last):  # type: ignore[no-untyped-def]
    body(job, first, last)  # noqa: F821 - each kernel is this code with a body of its own


@intrinsic
def _add(typing_context, place, number):  # type: ignore[no-untyped-def]
    """place[0] += number, atomically and in one order for all threads; what it was before."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, arguments[1], "seq_cst")

    return types.int64(place, types.int64), emit


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


@intrinsic
def _ask(typing_context, function):  # type: ignore[no-untyped-def]
    """Call the operating system's function at this address, which takes nothing and returns a number."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [])

    return types.int32(types.int64), emit


@compiled
def _work(jobs, counter):  # type: ignore[no-untyped-def]
    job, before = 0, 0  # and the chunks of the jobs before it: a thread's chunks come in order
    while True:
        chunk = _add(counter, 1)
        while job < len(jobs):
            rows, chunk_rows = jobs[job, _ROWS], jobs[job, _CHUNK_ROWS]
            chunks = (rows + chunk_rows - 1) // chunk_rows
            if chunk < before + chunks:
                break
            before += chunks
            job += 1
        if job == len(jobs):
            break
        first = (chunk - before) * chunk_rows
        _call(jobs, job, first, min(first + chunk_rows, rows))


@compiled
def _products(jobs):  # type: ignore[no-untyped-def]
    products = 0
    for job in range(len(jobs)):
        products += jobs[job, _ROWS] * jobs[job, _COLUMNS] * max(jobs[job, _TOKENS], 1)
    return products


# What the threads share: one number in each of a cache line's worth, so that writing one disturbs no reader of another.
_ROUND, _COUNTER, _INSIDE, _ASLEEP, _TABLE, _JOBS, _HELPERS, _PROCESSOR = range(0, 64, 8)
_STOP = -1  # in place of the number of helpers
_POLLS = 500
"""Turns a helper waits for the next table before it sleeps: some 200 microseconds, the gaps within a model's step."""


@compiled
def _lead(shared, jobs, ends, yield_, processor):  # type: ignore[no-untyped-def]
    """The caller's part of the tables that end before these rows, one after the other: each is a round.

    A round is open while its number is odd. It opens and closes within machine code, where no exception (Ctrl-C) can
    leave it open.
    """
    begin = 0
    for end in ends:
        table = jobs[begin:end]
        begin = end
        shared[_COUNTER] = 0
        if _products(table) < _WORTH_HELP:
            _work(table, shared[_COUNTER:])
            continue
        shared[_TABLE], shared[_JOBS] = table.ctypes.data, len(table)
        shared[_PROCESSOR] = _ask(processor) if processor else -1
        _add(shared[_ROUND:], 1)
        _work(table, shared[_COUNTER:])
        _add(shared[_ROUND:], 1)
        while _add(shared[_INSIDE:], 0) != 0:
            _ask(yield_)


@compiled
def _help(shared, number, yield_, processor):  # type: ignore[no-untyped-def]
    """Helper `number`'s part of all rounds, until there has been none for a while or all are to stop.

    True: it runs on the caller's processor, where it is no help. Systems leave two threads that keep waking each other
    together for seconds.
    """
    done, polls = 0, 0
    while polls < _POLLS and shared[_HELPERS] != _STOP:
        round_ = _add(shared[_ROUND:], 0)
        if round_ % 2 == 0 or round_ == done or number >= shared[_HELPERS]:
            polls += 1
            _ask(yield_)
            continue
        if processor and _ask(processor) == shared[_PROCESSOR]:
            return True
        _add(shared[_INSIDE:], 1)
        if _add(shared[_ROUND:], 0) == round_:  # still open, and now it stays so until this helper is out
            jobs = carray(pointer(shared[_TABLE]), (shared[_JOBS], len(FIELDS)), np.int64)
            _work(jobs, shared[_COUNTER:])
        _add(shared[_INSIDE:], -1)
        done, polls = round_, 0
    _add(shared[_ASLEEP:], 1)
    return False


@compiled
def _take_asleep(shared):  # type: ignore[no-untyped-def]
    """How many helpers are to be woken; they count as awake from now on."""
    asleep = _add(shared[_ASLEEP:], 0)
    _add(shared[_ASLEEP:], -asleep)
    return asleep


class _Crew:
    """The helpers, started when first needed."""

    def __init__(self) -> None:
        self.shared, self.busy, self.bell = np.zeros(72, np.int64), threading.Lock(), threading.Semaphore(0)
        self.helpers: list[threading.Thread] = []

    def lead(self, jobs: np.ndarray, ends: np.ndarray, workers: int) -> None:
        """Work off tables together, one after the other, that end before these rows; `busy` must be held."""
        while len(self.helpers) < workers - 1:
            helper = threading.Thread(target=self._serve, args=(len(self.helpers),), daemon=True)
            self.helpers.append(helper)
            helper.start()
        self.shared[_HELPERS] = workers - 1
        if asleep := _take_asleep(self.shared):
            self.bell.release(asleep)
        _lead(self.shared, jobs, ends, _yield_address, _processor_address)

    def _serve(self, number: int) -> None:
        processors = os.sched_getaffinity(0) if _processor_address else set()
        while self.shared[_HELPERS] != _STOP:
            if _help(self.shared, number, _yield_address, _processor_address if len(processors) > 1 else 0):
                os.sched_setaffinity(0, processors - {int(self.shared[_PROCESSOR])})  # of this thread
            else:
                self.bell.acquire()

    def stop(self) -> None:
        """Machine code goes away with the interpreter: no helper may be in it by then."""
        self.shared[_HELPERS] = _STOP
        self.bell.release(len(self.helpers) + 1)
        for helper in self.helpers:
            helper.join()


def _address(name: str) -> int:
    """Of a function of the operating system."""
    library = ctypes.windll.kernel32 if sys.platform == "win32" else ctypes.CDLL(None)
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


def _new_crew() -> None:
    global _crew
    _crew = _Crew()


_yield_address = _address("SwitchToThread" if sys.platform == "win32" else "sched_yield")
_processor_address = _address("sched_getcpu") if sys.platform == "linux" else 0  # nowhere else can a thread be moved
_new_crew()
atexit.register(lambda: _crew.stop())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_crew)  # threads stay behind in the parent


def run(jobs: list[Job] | np.ndarray, *memory: object) -> None:
    """Work off the jobs, a list or the rows of an int64 array. A recording keeps `memory` that they point into."""
    if isinstance(jobs, list):
        jobs = np.array(jobs, np.int64)
    if recorder := recording():
        recorder.take(jobs, *memory)
    if _products(jobs) < _WORTH_HELP:
        _work(jobs, np.zeros(1, np.int64))
    else:
        _work_off(jobs, [jobs], np.array([len(jobs)]))


def program(tables: list[np.ndarray]) -> Callable[[], None]:
    """A function that works off tables of jobs, one after the other."""
    jobs, ends = np.concatenate(tables), np.cumsum([len(table) for table in tables])
    return functools.partial(_work_off, jobs, tables, ends)


def _work_off(jobs: np.ndarray, tables: list[np.ndarray], ends: np.ndarray) -> None:
    """Works off tables that `jobs` holds one after the other, up to these rows each: with the helpers, or alone.

    Alone are all but one of several callers at once.
    """
    if (workers := threads()) == 1 or not _crew.busy.acquire(blocking=False):
        for table in tables:
            _work(table, np.zeros(1, np.int64))
        return
    try:
        _crew.lead(jobs, ends, workers)
    finally:
        _crew.busy.release()


# Recording


class Unrecordable(Exception):
    """A computation does what a recording cannot do again."""


_local = threading.local()


def record(recorder: Any) -> None:
    """From now on `recorder.take` gets this thread's tables; None: no longer."""
    _local.recorder = recorder


def recording() -> Any:
    """The recorder of this thread's jobs; None where they are not being recorded."""
    return getattr(_local, "recorder", None)


def repeat(work: Callable[[], None]) -> None:
    """Does the work, and when it is being recorded, with each repetition again: for Python that goes by numbers.

    It must write its results to memory that was there before, and read what it needs from such.
    """
    recorder = recording()
    if recorder is None:
        work()
        return
    recorder.take_work(work)
    record(None)  # what the work runs is its own
    try:
        work()
    finally:
        record(recorder)
