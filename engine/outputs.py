"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Logprob:
    """The natural logarithm of a token's probability under the model, before penalties and temperature.

    `rank` is 1 for the likeliest token; `text` is the token's own text.
    """

    logprob: float
    rank: int
    text: str


TokenLogprobs = dict[int, Logprob]


@dataclass(frozen=True)
class CompletionOutput:
    """One completion of a prompt. `stop_reason` is the stop string or token id that ended it, if one did.

    `logprobs`, when asked for, holds for each token the token itself and the likeliest alternatives, by token id.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its completions (`SamplingParams.n` of them).

    `prompt_logprobs`, when asked for, has an entry a prompt token; the first is None, for nothing precedes it.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
