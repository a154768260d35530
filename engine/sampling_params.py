"""How tokens are chosen and when a completion ends; names and defaults are vLLM's where it has them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from trichord.errors import RequestError


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request.

    temperature: 0 takes the likeliest token. top_k: 0 keeps all tokens. top_p: the smallest set of likeliest tokens
    with this mass. min_p: tokens at least this share of the likeliest one's probability. repetition_penalty divides
    positive (multiplies negative) logits of tokens in the prompt or the completion; presence_penalty and
    frequency_penalty are subtracted for tokens of the completion, once or for each time. logit_bias: token id ->
    number added to its logit. max_tokens: None is to the context's end. stop: strings that end the completion and are
    not part of it; stop_token_ids: the same by token. ignore_eos: go on past the model's own end tokens. seed: None
    draws one. logprobs, prompt_logprobs: how many alternatives to report a token. n: completions a prompt.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    max_tokens: int | None = None
    stop: list[str] | str = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", [self.stop] if isinstance(self.stop, str) else list(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", list(self.stop_token_ids or ()))
        self._check("temperature", 0.0, math.inf)
        self._check("top_p", 0.0, 1.0, open_below=True)
        self._check("min_p", 0.0, 1.0)
        self._check("repetition_penalty", 0.0, math.inf, open_below=True)
        self._check("presence_penalty", -2.0, 2.0)
        self._check("frequency_penalty", -2.0, 2.0)
        self._check("top_k", -1, math.inf, whole=True)
        self._check("n", 1, 1024, whole=True)
        for name, least in (("max_tokens", 1), ("seed", 0), ("logprobs", 0), ("prompt_logprobs", 0)):
            if getattr(self, name) is not None:
                self._check(name, least, 2**63 - 1, whole=True)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError("stop must be strings that are not empty.")
        if not all(_is_whole(token) and token >= 0 for token in self.stop_token_ids):
            raise RequestError("stop_token_ids must be token ids: whole numbers of 0 or more.")
        if self.logit_bias is not None:
            self._check_logit_bias()

    @property
    def penalizes(self) -> bool:
        """Whether a draw depends on the tokens before it by more than their logits."""
        return self.repetition_penalty != 1.0 or bool(self.presence_penalty or self.frequency_penalty)

    def _check(self, name: str, low: float, high: float, *, open_below: bool = False, whole: bool = False) -> None:
        value = getattr(self, name)
        kind_fits = _is_whole(value) if whole else _is_number(value)
        in_range = kind_fits and math.isfinite(value) and low <= value <= high and not (open_below and value == low)
        if not in_range:
            bounds = f"above {low:g}" if open_below else f"at least {low:g}"
            bounds += f" and at most {high:g}" if math.isfinite(high) and high < 2**32 else ""
            raise RequestError(f"{name} must be a {'whole ' if whole else ''}number {bounds}, not {value!r}.")

    def _check_logit_bias(self) -> None:
        for token, bias in self.logit_bias.items():
            if not (_is_whole(token) and token >= 0 and _is_number(bias) and not math.isnan(bias)):
                raise RequestError(f"logit_bias must map token ids to numbers, not {token!r} to {bias!r}.")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
