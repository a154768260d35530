"""Recording: what a computation does, taken down once, and done again without the Python between.

A token of a model takes some two hundred calls. The weights stream through the CPU's caches meanwhile, so that Python
finds its own memory cold after each, and needs about ten times as long as in a loop of its own: a third of a token's
time. A recording is a table of jobs with the addresses of that first time; whatever of torch came between is called
again, into the same memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trichord.cpu_fallback import jobs
from trichord.cpu_fallback.jobs import Unrecordable

_ALLOCATIONS = ("empty", "new_empty")


def capture(compute: Callable[[], torch.Tensor], reset: Callable[[], None]) -> Callable[[], torch.Tensor]:
    """Runs `compute`, and returns a function that gives its result for what its inputs hold by then.

    The inputs are tensors that stay where they are; so does the result, valid until the next call. `reset` is called
    before each of the runs here, to bring back what they change. Raises Unrecordable where `compute` does what cannot
    be recorded, such as Python that depends on a tensor's numbers, RuntimeError if the recording does not work.
    """
    recorder = Recorder()
    reset()
    with recorder:
        result = compute()
    expected = result.clone()
    recorder.finish()
    recorder.spoil()
    reset()
    recorder.replay()
    if not torch.equal(result, expected):
        raise RuntimeError("the recorded step does not repeat its result")

    def repeated() -> torch.Tensor:
        recorder.replay()
        return result

    return repeated


class Recorder(TorchDispatchMode):
    """While it is entered, takes down this thread's jobs and calls of torch, and keeps their memory."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[np.ndarray | Callable[[], None]] = []
        self._kept: list[Any] = []
        self._written: list[torch.Tensor] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is ever compiled by Dynamo: to be shielded from it would only import it, for seconds."""
        return False

    def __enter__(self) -> Recorder:
        jobs.record(self)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        jobs.record(None)

    def take(self, table: np.ndarray, *memory: Any) -> None:
        """A table of jobs that is about to be run, and what must live as long as it."""
        self._steps.append(table.copy())
        self._kept.append(memory)

    def take_work(self, work: Callable[[], None]) -> None:
        """What is about to be done, and has to be done as it is."""
        self._steps.append(work)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = function(*args, **kwargs)
        if not jobs.recording():
            return results
        tensors = _listed(results)
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
            raise Unrecordable(f"{function} takes a number out of a tensor")
        self._kept.append(results)
        if function._schema.is_mutable:
            self._steps.append(lambda: function(*args, **kwargs))
            return results
        # What a schema calls an alias may be a copy.
        places = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        if not any(_storage(tensor) in places for tensor in tensors):
            self._written += tensors
            if not function._schema.name.removeprefix("aten::").startswith(_ALLOCATIONS):
                self._steps.append(lambda: _again(tensors, function(*args, **kwargs)))
        return results

    def spoil(self) -> None:
        """Overwrites all that the computation wrote to memory of its own."""
        for tensor in self._written:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 1)

    def finish(self) -> None:
        """Joins tables that follow one another, to be worked off in one go."""
        steps, self._steps = self._steps, []
        for tables, group in itertools.groupby(steps, lambda step: isinstance(step, np.ndarray)):
            run = list(group)
            self._steps += [jobs.program(run)] if tables else run

    def replay(self) -> None:
        """Does everything again."""
        for step in self._steps:
            step()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _listed(results: Any) -> list[Any]:
    """What a call of torch returns: one thing or several."""
    return list(results) if isinstance(results, (tuple, list)) else [results]


def _again(targets: list[torch.Tensor], results: Any) -> None:
    for target, result in zip(targets, _listed(results), strict=True):
        target.copy_(result)
