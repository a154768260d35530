"""Decoding by graphs: a step in which every sequence has one token is done as a whole, not call by call.

A graph is captured for each padded number of sequences when that is first met. It reads static tensors, into which a
step's inputs are copied; rows beyond the step's sequences work on a page and a state slot that belong to nobody.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import torch

from trichord.batch import Batch
from trichord.cache import PAGE_SIZE, Cache
from trichord.device import CPU
from trichord.dispatch import Operations, Precision
from trichord.models.decoder import Decoder

Compute: TypeAlias = Callable[[], torch.Tensor]


class Capture(Protocol):
    """Makes replays of steps."""

    sizes: Sequence[int]
    """Numbers of sequences that steps are captured for, ascending; idle rows fill up to the next."""
    patience: int
    """Steps of a number of sequences that go by before they are captured, which costs some steps itself."""
    ahead: bool
    """Whether a replay is only begun, so that the host can begin the next one before it reads what this one gives."""

    def __call__(self, compute: Compute, reset: Callable[[], None]) -> Compute | None:
        """Runs a computation and returns its replay, which gives the results for what its inputs then hold.

        `reset` brings back what a run changes. None: this computation has no replay.
        """


# What a step changes, the 64-bit tensors first; the rest of a batch follows from the number of sequences.
_ROWS = ("token_ids", "positions", "slots", "state_slots", "context_lengths", "page_tables")
_LONGS = 4


@dataclass(frozen=True)
class Scratch:
    """The page and the state slot of rows that are no sequence's."""

    page: int
    slot: int


class DecodeGraphs:
    """The graphs of one model over its caches. `max_pages` bounds the pages of a sequence.

    A failure to capture warns once, and from then on there are no graphs.
    """

    def __init__(
        self,
        model: Decoder,
        caches: Sequence[Sequence[Cache]],
        precision: Precision,
        max_pages: int,
        scratch: Scratch,
        capture: Capture,
    ) -> None:
        self._model, self._caches, self._precision = model, caches, precision
        self._max_pages, self._scratch = max_pages, scratch
        self._capture: Capture | None = capture
        self.ahead = capture.ahead
        self._graphs: dict[int, tuple[Batch, DecodeInputs, Compute]] = {}
        self._met: Counter[int] = Counter()

    def logits(self, batch: Batch, token_ids: torch.Tensor | None = None) -> torch.Tensor | None:
        """The logits (S, vocabulary) of a batch of S sequences of one token, valid until the next call.

        With token_ids (S,) int64, on the device, these are the tokens; one below zero is none, and gives nothing.
        None for a batch of another kind, and where graphs cannot be captured: nothing has been computed then.
        """
        if batch.max_query != 1 or self._capture is None:
            return None
        size = padded_size(len(batch.token_ids), self._capture.sizes)
        if size is None:
            return None
        if size not in self._graphs:
            self._met[size] += 1
            if self._met[size] <= self._capture.patience:
                return None
            try:
                graph = self._captured(size)
            except Exception as error:  # Triton, torch and the driver each have exceptions of their own
                warnings.warn(f"Steps are computed call by call, for they could not be captured: {error}", stacklevel=2)
                graph = None
            if graph is None:
                self._capture = None
                self._graphs.clear()
                return None
            self._graphs[size] = graph
        idle, inputs, replay = self._graphs[size]
        if len(batch.new_slots):
            # The scratch state starts anew as well, lest it grow for ever.
            slots = torch.cat((batch.new_slots, batch.new_slots.new_tensor([self._scratch.slot])))
            self._model.clear_states(slots, self._caches)
        inputs.load(padded(batch, idle))
        if token_ids is not None:
            inputs.batch.token_ids[: len(token_ids)] = token_ids.clamp(min=0)
        return replay()[: len(batch.token_ids)]

    def _captured(self, size: int) -> tuple[Batch, DecodeInputs, Compute] | None:
        """The idle batch, the inputs and the replay; captured with idle rows, which change no sequence's state.

        None where such steps have no replay.
        """
        assert self._capture is not None
        idle = scratch_batch(size, self._max_pages, self._scratch)
        inputs = DecodeInputs(idle, self._model.outer.device)
        inputs.load(idle)

        def compute() -> torch.Tensor:
            hidden = self._model.forward(inputs.batch, self._caches, self._precision)
            return self._model.logits(hidden, self._precision)

        def reset() -> None:
            self._model.clear_states(torch.tensor([self._scratch.slot]), self._caches)

        replay = self._capture(compute, reset)
        return replay and (idle, inputs, replay)


class DecodeInputs:
    """Static tensors on the device in the shapes of a batch, in one buffer: a step's inputs go over in one copy."""

    def __init__(self, like: Batch, device: torch.device) -> None:
        ints = sum(getattr(like, name).numel() for name in _ROWS[_LONGS:])
        words = sum(getattr(like, name).numel() for name in _ROWS[:_LONGS]) + -(-ints // 2)
        cuda = device.type == "cuda"
        self._staged = torch.zeros(words, dtype=torch.int64, pin_memory=cuda)
        self._held = torch.zeros(words, dtype=torch.int64, device=device)
        self._rows = _views(self._staged, like)
        self._copied = torch.cuda.Event() if cuda else None
        self.batch = replace(like.to(device), **_views(self._held, like))

    def load(self, batch: Batch) -> None:
        """Takes a batch of the same shapes from the CPU; what runs on the device after this sees it."""
        if self._copied is None:
            self._stage(batch)
            return
        self._copied.synchronize()  # the last step's copy may still read what is overwritten here
        self._stage(batch)
        self._copied.record(torch.cuda.current_stream(self._held.device))

    def _stage(self, batch: Batch) -> None:
        for name, rows in self._rows.items():
            rows.copy_(getattr(batch, name))
        self._held.copy_(self._staged, non_blocking=True)


class CudaCapture:
    """Captures computations on one GPU as graphs that share their memory: only one runs at a time."""

    sizes = (1, 2, 4, 8, 16, 32, 64)
    patience = 0
    ahead = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = None

    def __call__(self, compute: Compute, reset: Callable[[], None]) -> Compute:
        """Runs `compute` once on the stream of captures, so that every kernel is compiled and loaded, then captures it.

        What kernels keep for all their launches on a stream is then there before the capture.
        """
        with torch.cuda.device(self._device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                compute()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU for their own ends meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                results = compute()

        def replay() -> torch.Tensor:
            with torch.cuda.device(self._device):
                graph.replay()
            return results

        return replay


class CpuCapture:
    """Records the CPU's steps. There, an idle row costs as much as any: every number of sequences has its own."""

    sizes = range(1, 9)
    patience = 4
    ahead = False

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    def __call__(self, compute: Compute, reset: Callable[[], None]) -> Compute | None:
        return self._operations.capture(compute, reset)


def capture_for(model: Decoder) -> Capture | None:
    """How steps of this model are captured; None where they cannot be: spread over devices, or in the interpreter."""
    if model.place is None:
        return None
    if model.place.device.type == "cuda":
        return CudaCapture(model.place.device)
    return CpuCapture(model.place.operations) if model.place == CPU else None


def padded_size(sequences: int, sizes: Sequence[int]) -> int | None:
    """The number of rows of the graph for so many sequences; None for more than any has."""
    return next((size for size in sizes if size >= sequences), None)


def scratch_batch(size: int, max_pages: int, scratch: Scratch) -> Batch:
    """A batch of `size` sequences that are none: each the first token of the scratch page."""
    rows = torch.zeros(size, dtype=torch.int64)
    return Batch(
        token_ids=rows,
        positions=rows,
        slots=rows + scratch.page * PAGE_SIZE,
        query_starts=torch.arange(size + 1, dtype=torch.int32),
        context_lengths=torch.ones(size, dtype=torch.int32),
        page_tables=torch.full((size, max_pages), scratch.page, dtype=torch.int32),
        logit_rows=torch.arange(size),
        state_slots=rows + scratch.slot,
        new_slots=rows[:0],
        max_query=1,
    )


def padded(batch: Batch, idle: Batch) -> Batch:
    """The idle batch with a batch of no more sequences, of one token each, in place of its first rows."""
    changed = {}
    for name in _ROWS:
        rows = getattr(batch, name)
        changed[name] = getattr(idle, name).clone()
        changed[name][tuple(slice(length) for length in rows.shape)] = rows
    return replace(idle, **changed)


def _views(words: torch.Tensor, like: Batch) -> dict[str, torch.Tensor]:
    """The changing tensors of a batch within a buffer of int64, one after the other."""
    views = {}
    for index, name in enumerate(_ROWS):
        if index == _LONGS:
            words = words.view(torch.int32)
        tensor = getattr(like, name)
        views[name] = words[: tensor.numel()].view(tensor.shape)
        words = words[tensor.numel() :]
    return views
