"""From logits to tokens: penalties, temperature, truncation and the draw, for all rows of a step at once.

The draw is a counter generator keyed by (seed, completion, position): the same token on every device, in any batch,
before and after a preemption.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List

import numpy as np
import torch

from trichord.errors import ModelError
from trichord.outputs import Logprob, TokenLogprobs
from trichord.sequence import Sequence

# Enough candidates that the likeliest tokens nearly always hold the mass top_p asks for, without sorting them all.
_CANDIDATES = 1024


def sample(logits: torch.Tensor, sequences: List[Sequence]) -> list[int]:
    """logits (R, V) float32, changed in place; a row a sequence -> the next token of each.

    Order: bias and penalties, temperature, min_p, top_k, top_p, draw. Raises ModelError for logits that are not
    finite.
    """
    if not bool(torch.isfinite(logits.amax(-1)).all()):  # an infinite or undefined logit reaches the maximum
        raise ModelError("The model computed logits that are not finite numbers: its weights may be damaged.")
    for row, sequence in zip(logits, sequences, strict=True):
        _penalize(row, sequence)
    drawing = [index for index, sequence in enumerate(sequences) if sequence.params.temperature > 0]
    tokens = logits.argmax(-1)
    if drawing:
        rows = logits if len(drawing) == len(sequences) else logits[drawing]
        tokens[drawing] = _draw(rows, [sequences[index] for index in drawing])
    return tokens.tolist()


def log_likelihoods(logits: torch.Tensor, tokens: List[int]) -> torch.Tensor:
    """logits (R, V) and the token that followed each row -> the log-probability (R,) float32 of each of those."""
    logits = logits.float()
    chosen = logits.gather(1, torch.tensor(tokens, dtype=torch.int64, device=logits.device)[:, None]).squeeze(1)
    return chosen - logits.logsumexp(-1)


def report_logprobs(
    logits: torch.Tensor, tokens: List[int], count: int, piece: Callable[[int], str]
) -> list[TokenLogprobs]:
    """logits (R, V) and the token that followed each row -> that token and the `count` likeliest, by token id.

    `piece` gives a token's text.
    """
    logprobs = torch.log_softmax(logits.float(), -1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = (logprobs > chosen).sum(-1) + 1
    values, ids = logprobs.topk(min(count, logits.shape[-1]), -1)
    report = []
    for row, token in enumerate(tokens):
        entries = {token: Logprob(chosen[row].item(), int(ranks[row]), piece(token))}
        for rank, (value, other) in enumerate(zip(values[row].tolist(), ids[row].tolist(), strict=True), start=1):
            entries.setdefault(other, Logprob(value, rank, piece(other)))
        report.append(entries)
    return report


def _penalize(row: torch.Tensor, sequence: Sequence) -> None:
    params = sequence.params
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=row.device)
        row[ids] += torch.tensor(list(params.logit_bias.values()), dtype=row.dtype, device=row.device)
    if params.repetition_penalty != 1.0:
        ids = torch.tensor(sorted(set(sequence.tokens)), device=row.device)
        values = row[ids]
        factor = params.repetition_penalty
        row[ids] = torch.where(values > 0, values / factor, values * factor)
    if params.presence_penalty or params.frequency_penalty:
        ids, counts = np.unique(np.asarray(sequence.completion_ids, np.int64), return_counts=True)
        penalty = params.presence_penalty + params.frequency_penalty * counts
        row[torch.from_numpy(ids).to(row.device)] -= torch.from_numpy(penalty).to(row.device, row.dtype)


def _draw(logits: torch.Tensor, sequences: List[Sequence]) -> torch.Tensor:
    def column(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        values = [getattr(sequence.params, name) for sequence in sequences]
        return torch.tensor(values, dtype=dtype, device=logits.device)[:, None]

    # The maximum goes first, so that a tiny temperature cannot overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)) / column("temperature")
    min_p = column("min_p")
    if bool((min_p > 0).any()):
        scaled = scaled.masked_fill(scaled < min_p.log(), -torch.inf)
    probabilities = torch.softmax(scaled, -1)
    top_k, top_p = column("top_k", torch.int64), column("top_p")
    if bool((top_k > 0).any() or (top_p < 1).any()):
        probabilities = _truncate(probabilities, top_k, top_p)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    draws = torch.tensor([[_uniform(sequence)] for sequence in sequences], dtype=torch.float64, device=logits.device)
    tokens = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True).squeeze(-1)
    return tokens.clamp_(max=logits.shape[-1] - 1)


def _truncate(probabilities: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zeroes all but each row's top_k likeliest of probabilities (R, V), then all but the first top_p of their mass."""
    vocabulary = probabilities.shape[-1]
    top_k = torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary)
    bounded = int(top_k.max())
    candidates = min(bounded, _CANDIDATES) if bool((top_p < 1).all()) else bounded
    values, ids = probabilities.topk(candidates, -1)
    if candidates < bounded and bool((values.sum(-1, keepdim=True) < top_p).any()):
        values, ids = probabilities.topk(bounded, -1)
    rank = torch.arange(values.shape[-1], device=values.device)
    values = values.masked_fill(rank >= top_k, 0.0)
    mass = values.cumsum(-1, dtype=torch.float64)
    # With top_k, the mass that top_p divides is that of the top_k; a token stays if what precedes it falls short.
    total = torch.where(top_k < vocabulary, mass[:, -1:], torch.ones_like(mass[:, -1:]))
    values = values.masked_fill(mass - values >= top_p * total, 0.0)
    return torch.zeros_like(probabilities).scatter_(-1, ids, values)


def _uniform(sequence: Sequence) -> float:
    """The draw in [0, 1) that belongs to this position of this completion."""
    generator = np.random.Philox(key=[sequence.seed, sequence.index], counter=[len(sequence.tokens), 0, 0, 0])
    return (int(generator.random_raw()) >> 11) * 2.0**-53
