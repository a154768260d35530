"""From logits to tokens: penalties, temperature, truncation and the draw, for all rows of a step at once.

The draw is a counter generator keyed by (seed, completion, position): the same token on every device, in any batch,
before and after a preemption.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List
from typing import Any

import numpy as np
import torch

from trichord.errors import ModelError
from trichord.outputs import Logprob, TokenLogprobs
from trichord.sequence import Sequence

# Enough candidates that the likeliest tokens nearly always hold the mass top_p asks for, without sorting them all.
_CANDIDATES = 1024

# What a row has in place of a token, so that the host learns of it when it reads the tokens.
_NOT_FINITE, _TOO_FEW = -1, -2


class Drawn:
    """A token for each row, drawn where the logits lie; the host waits for it in `read` alone."""

    def __init__(self, logits: torch.Tensor, sequences: List[Sequence], ahead: int = 0) -> None:
        """logits (R, V) float32, changed in place; a row a sequence, which has `ahead` more tokens than the host knows.

        Order: bias and penalties, temperature, min_p, top_k, top_p, draw.
        """
        positions = [len(sequence.tokens) + ahead for sequence in sequences]
        maxima = logits.amax(-1)  # an infinite or undefined logit reaches the maximum
        _penalize(logits, sequences)
        tokens = logits.argmax(-1)
        drawing = [index for index, sequence in enumerate(sequences) if sequence.params.temperature > 0]
        if drawing:
            rows = _tensor(drawing, torch.int64, logits.device)
            tokens[rows] = _draw(logits[rows], *_chosen(drawing, sequences, positions), _CANDIDATES)
        self.tokens = torch.where(torch.isfinite(maxima), tokens, _NOT_FINITE)
        """(R,) int64, beside the logits; below zero where there is none yet."""
        self.redrawn = False
        """Whether `read` has drawn a token itself, which `tokens` does not have."""
        self._logits, self._sequences, self._positions = logits, sequences, positions
        self._copy = self.tokens.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        self._copied: torch.cuda.Event | None = None
        if logits.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(logits.device))

    def read(self) -> list[int]:
        """The tokens. Raises ModelError for logits that are not finite."""
        if self._copied is not None:
            self._copied.synchronize()
        drawn = self._copy.tolist()
        if _NOT_FINITE in drawn:
            raise ModelError("The model computed logits that are not finite numbers: its weights may be damaged.")
        again = [index for index, token in enumerate(drawn) if token == _TOO_FEW]
        if again:
            self.redrawn = True
            rows = _tensor(again, torch.int64, self._logits.device)
            chosen = _chosen(again, self._sequences, self._positions)
            redrawn = _draw(self._logits[rows], *chosen, self._logits.shape[-1])
            for index, token in zip(again, redrawn.tolist(), strict=True):
                drawn[index] = token
        return drawn


def sample(logits: torch.Tensor, sequences: List[Sequence]) -> list[int]:
    """logits (R, V) float32, changed in place; a row a sequence -> the next token of each: see `Drawn`."""
    return Drawn(logits, sequences).read()


def log_likelihoods(logits: torch.Tensor, tokens: List[int]) -> torch.Tensor:
    """logits (R, V) and the token that followed each row -> the log-probability (R,) float32 of each of those."""
    logits = logits.float()
    chosen = logits.gather(1, _tensor(tokens, torch.int64, logits.device)[:, None]).squeeze(1)
    return chosen - logits.logsumexp(-1)


def report_logprobs(
    logits: torch.Tensor, tokens: List[int], count: int, piece: Callable[[int], str]
) -> list[TokenLogprobs]:
    """logits (R, V) and the token that followed each row -> that token and the `count` likeliest, by token id.

    `piece` gives a token's text.
    """
    logprobs = torch.log_softmax(logits.float(), -1)
    chosen = logprobs.gather(1, _tensor(tokens, torch.int64, logits.device)[:, None])
    ranks = (logprobs > chosen).sum(-1) + 1
    best = logprobs.topk(min(count, logits.shape[-1]), -1)
    columns = (chosen.squeeze(1), ranks, *best)
    report = []
    for token, own, own_rank, values, ids in zip(tokens, *(column.tolist() for column in columns), strict=True):
        entries = {token: Logprob(own, own_rank, piece(token))}
        for rank, (value, other) in enumerate(zip(values, ids, strict=True), start=1):
            entries.setdefault(other, Logprob(value, rank, piece(other)))
        report.append(entries)
    return report


def _penalize(logits: torch.Tensor, sequences: List[Sequence]) -> None:
    """Adds each row's bias and applies its penalties, in place."""
    every = [sequence.params for sequence in sequences]
    biases = [(list((params.logit_bias or {}).keys()), list((params.logit_bias or {}).values())) for params in every]
    if any(ids for ids, _ in biases):
        place, values = _entries(biases, logits)
        logits[place] += values
    if any(params.repetition_penalty != 1.0 for params in every):
        repeated = [
            sorted(set(sequence.tokens)) if params.repetition_penalty != 1.0 else []
            for sequence, params in zip(sequences, every, strict=True)
        ]
        factors = [[params.repetition_penalty] * len(ids) for ids, params in zip(repeated, every, strict=True)]
        place, factor = _entries(list(zip(repeated, factors, strict=True)), logits)
        values = logits[place]
        logits[place] = torch.where(values > 0, values / factor, values * factor)
    if any(params.presence_penalty or params.frequency_penalty for params in every):
        place, penalty = _entries([_counted_penalty(sequence) for sequence in sequences], logits)
        logits[place] -= penalty


def _counted_penalty(sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """The tokens generated so far and what is subtracted from the logit of each."""
    params = sequence.params
    if not (params.presence_penalty or params.frequency_penalty):
        return np.empty(0, np.int64), np.empty(0)
    ids, counts = np.unique(np.asarray(sequence.completion_ids, np.int64), return_counts=True)
    return ids, params.presence_penalty + params.frequency_penalty * counts


def _entries(
    by_row: List[tuple[List[int] | np.ndarray, List[float] | np.ndarray]], logits: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Token ids and values of each row -> the places of all of them among the logits, and the values."""
    rows = np.repeat(np.arange(len(by_row)), [len(ids) for ids, _ in by_row])
    ids, values = (
        np.concatenate([np.asarray(row[i], kind) for row in by_row]) for i, kind in enumerate((np.int64, np.float64))
    )
    place = tuple(_tensor(index, torch.int64, logits.device) for index in (rows, ids))
    return place, _tensor(values, logits.dtype, logits.device)


def _chosen(indices: List[int], *lists: List[Any]) -> list[list[Any]]:
    """The elements of each list at these indices."""
    return [[each[index] for index in indices] for each in lists]


def _draw(logits: torch.Tensor, sequences: List[Sequence], positions: List[int], candidates: int) -> torch.Tensor:
    """logits (R, V) -> tokens (R,) int64 for these positions.

    _TOO_FEW stands where the `candidates` likeliest do not hold the mass of top_p.
    """
    names = ("temperature", "min_p", "top_p", "top_k")
    numbers = [
        [*(getattr(sequence.params, name) for name in names), _uniform(sequence, position)]
        for sequence, position in zip(sequences, positions, strict=True)
    ]
    columns = _tensor(numbers, torch.float64, logits.device)
    temperature, min_p, top_p = (columns[:, i, None].float() for i in range(3))
    draws = columns[:, 4, None]
    # The maximum goes first, so that a tiny temperature cannot overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    every = [sequence.params for sequence in sequences]
    if any(params.min_p > 0 for params in every):
        scaled = scaled.masked_fill(scaled < min_p.log(), -torch.inf)
    probabilities = torch.softmax(scaled, -1)
    too_few = None
    if any(params.top_k > 0 or params.top_p < 1 for params in every):
        vocabulary = logits.shape[-1]
        # Rows without a top_k need all tokens sorted, unless a few of them hold the mass of top_p.
        unbounded = min(candidates, vocabulary) if all(params.top_p < 1 for params in every) else vocabulary
        bound = max(min(params.top_k, vocabulary) if params.top_k > 0 else unbounded for params in every)
        probabilities, too_few = _truncate(probabilities, columns[:, 3, None].long(), top_p, bound)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True).squeeze(-1)
    tokens.clamp_(max=logits.shape[-1] - 1)
    return tokens if too_few is None else torch.where(too_few, _TOO_FEW, tokens)


def _truncate(
    probabilities: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeroes all but each row's top_k likeliest of probabilities (R, V), then all but the first top_p of their mass.

    Only the `candidates` likeliest are looked at; the second result (R,) says for which rows that was too few.
    """
    vocabulary = probabilities.shape[-1]
    top_k = torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary)
    values, ids = probabilities.topk(candidates, -1)
    too_few = (top_k > candidates) & (values.sum(-1, keepdim=True) < top_p) & (candidates < vocabulary)
    rank = torch.arange(values.shape[-1], device=values.device)
    values = values.masked_fill(rank >= top_k, 0.0)
    mass = values.cumsum(-1, dtype=torch.float64)
    # With top_k, the mass that top_p divides is that of the top_k; a token stays if what precedes it falls short.
    total = torch.where(top_k < vocabulary, mass[:, -1:], torch.ones_like(mass[:, -1:]))
    values = values.masked_fill(mass - values >= top_p * total, 0.0)
    return torch.zeros_like(probabilities).scatter_(-1, ids, values), too_few.squeeze(-1)


def _tensor(values: object, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers on the device, without waiting for what it does."""
    return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)


def _uniform(sequence: Sequence, position: int) -> float:
    """The draw in [0, 1) that belongs to this position of this completion."""
    generator = np.random.Philox(key=[sequence.seed, sequence.index], counter=[position, 0, 0, 0])
    return (int(generator.random_raw()) >> 11) * 2.0**-53
