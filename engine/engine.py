"""The engine: model, caches and scheduler, driven one step at a time by whoever waits for a result.

There is no background thread. Every caller adds its sequences and then takes steps under the lock until they are done;
a step serves the sequences of all callers, so several threads share one batch. A GPU is given the next step, where that
can be, before the tokens of the last one are read: it draws them itself, and what follows an end is thrown away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from contextlib import AbstractContextManager
from typing import Any

import torch

from trichord.batch import Batch
from trichord.cache import PagePool
from trichord.decode_graph import Capture, DecodeGraphs, Scratch
from trichord.device import memory_errors
from trichord.dispatch import Precision
from trichord.launched import Launched
from trichord.models.decoder import Decoder
from trichord.outputs import TokenLogprobs
from trichord.sampling import log_likelihoods, report_logprobs
from trichord.scheduler import Chunk, Scheduler
from trichord.sequence import Sequence


class Engine:
    """Runs sequences to their ends.

    `pages` cache pages of `kv_dtype` are allocated for every layer where the layer lies; a sequence has `max_pages` at
    most. `piece` gives a token's text, for log-probability reports. `capture` makes graphs of steps that only decode.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        precision: Precision,
        kv_dtype: torch.dtype,
        pages: int,
        max_batch_tokens: int,
        max_sequences: int,
        max_pages: int,
        piece: Callable[[int], str],
        capture: Capture | None = None,
    ) -> None:
        self.model = model
        causal = model.config.architecture.causal
        self.precision = precision
        self.scheduler = Scheduler(
            PagePool(pages, sharing=causal and not model.has_states), max_batch_tokens, max_sequences, splitting=causal
        )
        self._piece = piece
        self._lock = threading.Lock()
        spare = 0 if capture is None else 1  # for the idle rows of a graph
        with memory_errors("allocating the key-value cache", "try a smaller context_length"):
            self.caches = [
                [
                    spec.allocate(pages + spare, max_sequences + spare, kv_dtype, layer.place.device)
                    for spec in layer.caches
                ]
                for layer in model.layers
            ]
        self._graphs: DecodeGraphs | None = None
        self._ahead: Launched | None = None
        """The next step, if the device has it already: launched before the tokens of the last one were read."""
        if capture is not None:
            scratch = Scratch(pages, max_sequences)
            self._graphs = DecodeGraphs(model, self.caches, precision, max_pages, scratch, capture)

    def run(self, sequences: List[Sequence]) -> Iterator[None]:
        """Adds the sequences and yields after every step until all have finished.

        Sequences that have not finished when the iterator is closed, or when a step fails, are aborted.
        """
        with self._lock:
            for sequence in sequences:
                self.scheduler.add(sequence)
        try:
            while not all(sequence.finished for sequence in sequences):
                with self._lock:
                    if not all(sequence.finished for sequence in sequences):  # another thread's step may have done it
                        self._step()
                yield
        finally:
            self.abort(sequences)

    def abort(self, sequences: List[Sequence]) -> None:
        """Ends those of the sequences that are still going, and frees their pages."""
        with self._lock:
            for sequence in sequences:
                if not sequence.finished:
                    sequence.finish("abort")
                    self.scheduler.retire(sequence)

    @torch.inference_mode()
    def _step(self) -> None:
        launched, self._ahead = self._ahead, None
        if launched is not None and launched.is_void:
            launched = None
        chunks = launched.chunks if launched else self.scheduler.schedule()
        try:
            launched = launched or Launched.of(chunks, self._results(chunks))
            self._ahead = self._launch_next(launched)
            self._book(launched)
        except BaseException:
            self._take_back(chunks)
            raise

    def _take_back(self, chunks: list[Chunk]) -> None:
        """Forgets what is computed but not booked.

        Keys and values are written again where they were; a state has moved on and must be computed anew.
        """
        self._ahead = None
        if self.model.has_states:
            for chunk in reversed(chunks):
                if not chunk.sequence.finished:
                    self.scheduler.preempt(chunk.sequence)

    def _launch_next(self, launched: Launched) -> Launched | None:
        """The step after this one, where the device can go on by itself with the tokens that the host has not read."""
        if not (self._graphs and self._graphs.ahead and launched.leads_on):
            return None
        chunks = self.scheduler.following(launched.chunks)
        if chunks is None:
            return None
        with _memory_errors():
            logits = self._graphs.logits(Batch.of(chunks), launched.drawn.tokens)
        return None if logits is None else Launched.of(chunks, logits.split(1), ahead=1)

    def _results(self, chunks: list[Chunk]) -> List[torch.Tensor]:
        """What each chunk's `logit_rows` give: their logits, or the hidden states where these are to be reported."""
        batch = Batch.of(chunks)
        with _memory_errors():
            if self._graphs and all(chunk.draws and not chunk.sequence.owes_prompt_results for chunk in chunks):
                logits = self._graphs.logits(batch)
                if logits is not None:
                    return logits.split(1)
            hidden = self.model.forward(batch, self.caches, self.precision)
            parts = list(torch.split(hidden, [chunk.logit_rows for chunk in chunks]))
            predicting = [i for i, chunk in enumerate(chunks) if chunk.sequence.prompt_report != "hidden"]
            if predicting:
                states = hidden if len(predicting) == len(parts) else torch.cat([parts[i] for i in predicting])
                logits = self.model.logits(states, self.precision)
                for i, part in zip(predicting, logits.split([len(parts[i]) for i in predicting]), strict=True):
                    parts[i] = part
        return parts

    def _book(self, launched: Launched) -> None:
        """Waits for a step's results and takes them; a sequence that has ended since its launch takes nothing."""
        going_on = [
            (chunk, part)
            for chunk, part in zip(launched.chunks, launched.parts, strict=True)
            if not chunk.sequence.finished
        ]
        reports = [self._prompt_report(chunk, part) for chunk, part in going_on]
        drawn = self._drawn(launched)
        # Nothing has changed until here, so that a step that was interrupted or failed can be taken again.
        for (chunk, _), report in zip(going_on, reports, strict=True):
            self._commit(chunk, report, drawn.get(chunk.sequence))
        if self._ahead and launched.drawn.redrawn:
            self._take_back(self._ahead.chunks)

    def _prompt_report(self, chunk: Chunk, logits: torch.Tensor) -> list[Any]:
        sequence = chunk.sequence
        if not sequence.owes_prompt_results:
            return []
        skipped = [None] * (chunk.count - len(logits))
        if sequence.prompt_report in ("logits", "hidden"):
            return skipped + list(logits.float().cpu().numpy())
        # A row predicts the token after its own; what the last row of the prompt predicts is drawn, not reported.
        following = sequence.tokens[chunk.end - len(logits) + 1 : chunk.end + 1]
        rows = logits[: len(following)]
        if sequence.prompt_report == "likelihoods":
            report = log_likelihoods(rows, following).tolist()
        else:
            report = report_logprobs(rows, following, sequence.params.prompt_logprobs, self._piece)
        return [*skipped, *report, *([None] if chunk.completes else [])]

    def _drawn(self, launched: Launched) -> dict[Sequence, tuple[int, TokenLogprobs | None]]:
        if launched.drawn is None:
            return {}
        drawn = {}
        for chunk, row, token in zip(launched.drawing, launched.logits, launched.drawn.read(), strict=True):
            count = chunk.sequence.params.logprobs
            entries = None if count is None else report_logprobs(row[None], [token], count, self._piece)[0]
            drawn[chunk.sequence] = (token, entries)
        return drawn

    def _commit(self, chunk: Chunk, report: list[Any], drawn: tuple[int, TokenLogprobs | None] | None) -> None:
        sequence = chunk.sequence
        sequence.prompt_results += report
        self.scheduler.computed(chunk)
        if drawn is not None:
            sequence.append(*drawn)
        elif chunk.completes:
            sequence.finish("length")
        if sequence.finished:
            self.scheduler.retire(sequence)


def _memory_errors() -> AbstractContextManager[None]:
    return memory_errors("computing a step", "try fewer gpu_layers, or a smaller context_length or max_batch_tokens")
