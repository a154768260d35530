"""A sequence: one completion on its way through the scheduler, from its prompt's tokens to its last one."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any, Literal

from trichord.completion_text import CompletionText
from trichord.outputs import CompletionOutput, FinishReason, TokenLogprobs
from trichord.sampling_params import SamplingParams


@dataclass(eq=False)
class Sequence:
    """Tokens, their pages, and how many of them the caches already hold; `reused` of them when it was admitted.

    `prompt_report` asks for the logits, the log-probabilities or the log-likelihood of the next token, or the hidden
    state, at every prompt position from `report_from` on, which the engine puts into `prompt_results` (None before). A
    sequence with `generates` False ends once its prompt is computed.
    """

    tokens: list[int]
    params: SamplingParams
    text: CompletionText
    stop_ids: frozenset[int]
    limit: int
    index: int = 0
    generates: bool = True
    prompt_report: Literal["logits", "logprobs", "likelihoods", "hidden"] | None = None
    report_from: int = 0
    prompt_length: int = field(init=False)
    seed: int = field(init=False)
    pages: list[int] = field(default_factory=list)
    slot: int = -1
    computed: int = 0
    reused: int = 0
    remembered_pages: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_results: list[Any] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)
        self.seed = secrets.randbits(63) if self.params.seed is None else self.params.seed

    @property
    def finished(self) -> bool:
        """Whether the completion has ended, for whatever reason."""
        return self.finish_reason is not None

    @property
    def completion_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.tokens[self.prompt_length :]

    @property
    def owes_prompt_results(self) -> bool:
        """Whether prompt positions still have results to report: they must be computed, not found in a cache."""
        return self.prompt_report is not None and len(self.prompt_results) < self.prompt_length

    def append(self, token: int, logprobs: TokenLogprobs | None = None) -> None:
        """Takes the next token, with its log-probabilities, and ends the completion where it should end."""
        self.tokens.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
            self.cumulative_logprob += logprobs[token].logprob
        if token in self.stop_ids:
            self.finish("stop", token if token in self.params.stop_token_ids else None)
            return
        stop = self.text.add(token)
        if stop is not None:
            self.finish("stop", stop)
        elif len(self.tokens) >= self.limit:
            self.finish("length")

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """Ends the completion; a second end changes nothing."""
        if self.finished:
            return
        self.text.close()
        self.stop_reason = stop_reason
        self.finish_reason = reason

    def output(self) -> CompletionOutput:
        """The completion as the caller sees it."""
        wants_logprobs = self.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=self.text.text,
            token_ids=self.completion_ids,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            cumulative_logprob=self.cumulative_logprob if wants_logprobs else None,
            logprobs=self.logprobs if wants_logprobs else None,
        )
