"""Perplexity: how well a model predicts a text, chunk by chunk as llama.cpp's perplexity tool measures it.

https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/perplexity.cpp: the text is cut into chunks of one
context each; a chunk begins with the beginning-of-sequence token, in place of its own first, where the vocabulary wants
it; the tokens of its second half are scored, so that each is predicted from at least half a context.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trichord.errors import RequestError

if TYPE_CHECKING:
    from trichord.llm import LLM

DEFAULT_CONTEXT = 512


@dataclass(frozen=True)
class Estimate:
    """After some chunks: the perplexity exp(mean negative log-likelihood) over `tokens` scored tokens.

    `error` is the perplexity times the standard error of that mean.
    """

    chunks: int
    tokens: int
    perplexity: float
    error: float


def chunks(tokens: List[int], context: int, bos_id: int | None = None) -> list[list[int]]:
    """The text's whole chunks of `context` tokens, each with `bos_id` as its first token unless that is None.

    Raises RequestError for a text of less than two chunks, or chunks of less than four tokens: nothing could be scored.
    """
    if context < 4:
        raise RequestError(f"The context must hold at least 4 tokens to be scored in halves, not {context}.")
    if len(tokens) < 2 * context:
        raise RequestError(
            f"The text has {len(tokens)} tokens, and at least {2 * context} are needed, twice the context:"
            " give a longer text or a smaller context_length."
        )
    starts = range(0, len(tokens) - context + 1, context)
    first = [] if bos_id is None else [bos_id]
    return [[*first, *tokens[start + len(first) : start + context]] for start in starts]


def text_chunks(llm: LLM, text: str, context: int) -> list[list[int]]:
    """The chunks of a text, by the model's own tokenizer."""
    ids = llm.require_tokenizer().encode(text)
    # The tokenizer shows whether the vocabulary wants the beginning-of-sequence token.
    bos = ids[0] if ids and ids[0] == llm.tokenizer.bos_id else None
    return chunks(ids, context, bos)


def estimates(llm: LLM, chunks: List[List[int]]) -> Iterator[Estimate]:
    """Computes chunk after chunk, and yields the estimate over all of them so far."""
    count, total, squares = 0, 0.0, 0.0
    for number, chunk in enumerate(chunks, start=1):
        scores = -llm.log_likelihoods(chunk, len(chunk) // 2 + 1)
        count += len(scores)
        total += float(scores.sum())
        squares += float(np.square(scores).sum())
        mean = total / count
        variance = max(squares / count - mean * mean, 0.0)
        perplexity = _exp(mean)
        yield Estimate(number, count, perplexity, perplexity * math.sqrt(variance / max(count - 1, 1)))


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf
