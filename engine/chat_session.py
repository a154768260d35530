"""A conversation with a model, turn by turn, of which each turn computes only what is new."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trichord.chat_template import ChatTemplate, check_messages, encode_rendered
from trichord.errors import RequestError

if TYPE_CHECKING:
    from trichord.llm import LLM, TextStream
    from trichord.sampling_params import SamplingParams

_THOUGHT_BEGINS, _THOUGHT_ENDS = "<think>", "</think>"


@dataclass(frozen=True)
class Turn:
    """What one answer took: `reused` of the `prompt` tokens, all of the conversation so far, came from the cache."""

    prompt: int
    reused: int
    generated: int
    prompt_seconds: float
    generation_seconds: float


class ChatSession:
    """Keeps a conversation's messages and the tokens they were.

    The engine finds the cache's full pages of a prompt that begins like an earlier one. For that the tokens must be
    the same: an answer's own tokens are kept, because its text may well be encoded differently.

    >>> session = ChatSession(llm, system="Be brief.")
    >>> print("".join(session.ask("Hello!")))
    """

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams | None = None,
        *,
        system: str | None = None,
        template: str | os.PathLike[str] | None = None,
        tools: List[Mapping[str, Any]] | None = None,
        **template_arguments: Any,
    ) -> None:
        """template: a preset's name or a Jinja file to use instead of the model file's own template.

        tools and template_arguments go to the template. Raises TokenizerError for a model without a tokenizer that can
        be used, TemplateError for a template that cannot be read.
        """
        self.llm = llm
        self._tokenizer = llm.require_tokenizer()
        own = template is None
        self._template = llm.chat_template if own else ChatTemplate.from_gguf(llm.file, self._tokenizer, template)
        self._variables = {**template_arguments, "tools": tools}
        self._params = self._template.with_stops(params)
        self._text, self._ids = "", []
        self.messages: list[dict[str, Any]] = []
        self.turns: list[Turn] = []
        if system:
            self.system = system

    @property
    def system(self) -> str | None:
        """The system message's text, which may be set at any time; None or "" removes it."""
        first = self.messages[0] if self.messages else {}
        return first["content"] if first.get("role") == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = self.messages[1:] if self.system is not None else self.messages
        self.messages = [{"role": "system", "content": text}, *rest] if text else list(rest)

    def reset(self) -> None:
        """Forgets all messages but the system's."""
        self.messages = self.messages[:1] if self.system is not None else []

    def ask(self, text: str) -> Iterator[str]:
        """Adds a user's message, yields the answer as it comes, and adds that.

        Closing the iterator interrupts the answer and keeps what there is of it. Without any, as after an error, the
        conversation is as it was before. Raises RequestError when the conversation has outgrown the context, and
        TemplateError when the template fails.
        """
        self.messages.append({"role": "user", "content": text})
        stream = None
        try:
            rendered = self._template.render(self.messages, **self._variables)
            ids = self._encode(rendered)
            if len(ids) >= self.llm.context_length:
                raise RequestError(
                    f"The conversation has grown to {len(ids)} tokens, and the context holds"
                    f" {self.llm.context_length}: begin a new one, or raise context_length."
                )
            stream = self.llm.stream(ids, self._params)
            yield from stream
        finally:
            if stream is not None:
                stream.close()
            if stream is None or not stream.output.outputs[0].text:
                self.messages.pop()
            else:
                self._keep(rendered, ids, stream)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the messages as JSON. Raises RequestError when that is not possible."""
        try:
            Path(path).write_text(json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise RequestError(f"{path}: the conversation cannot be written: {reason}.") from None

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replaces the messages by those of a JSON file: a list of {"role", "content"} and whatever else.

        Raises RequestError when the file cannot be read or holds something else.
        """
        try:
            loaded = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"it is not JSON ({error})"
            raise RequestError(f"{path}: the conversation cannot be read: {reason}.") from None
        try:
            self.messages = check_messages(loaded)
        except RequestError as error:
            raise RequestError(f"{path}: this is no conversation: {error}.") from None

    def _encode(self, text: str) -> list[int]:
        """The conversation's tokens: those of the turns before, as they were, and the new ones."""
        if self._ids and text.startswith(self._text):
            new = self._tokenizer.encode(text[len(self._text) :], add_special=False, parse_special=True)
            # After an end of turn nothing depends on what was before; elsewhere the border may lie within a token.
            if new and new[0] in self._tokenizer.stop_ids:
                return self._ids + new
        return encode_rendered(self._tokenizer, text)

    def _keep(self, rendered: str, ids: list[int], stream: TextStream) -> None:
        """Takes the answer into the conversation, and its tokens into what is known."""
        answer = stream.output.outputs[0]
        tokens = list(answer.token_ids)
        if tokens and tokens[-1] in self._tokenizer.stop_ids:
            tokens.pop()  # the template writes it
        # Where a stop text cut the answer off, the tokens say more than the text.
        said = tokens if self._tokenizer.decode(tokens, continues=True) == answer.text else []
        self._text = rendered + (answer.text if said else "")
        self._ids = ids + said
        self.messages.append(_message(answer.text))
        seconds = stream.prompt_seconds, stream.generation_seconds
        self.turns.append(Turn(len(ids), stream.reused_tokens, len(answer.token_ids), *seconds))


def _message(text: str) -> dict[str, str]:
    """An answer as a message; what a model thought aloud first is a field of its own, as templates expect it."""
    thought, end, answer = text.partition(_THOUGHT_ENDS)
    if not end:
        return {"role": "assistant", "content": text}
    thought = thought.strip().removeprefix(_THOUGHT_BEGINS).strip()
    return {"role": "assistant", "content": answer.lstrip(), "reasoning_content": thought}
