"""The chat template of a GGUF file: a conversation to the text that the model was trained to continue."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trichord.errors import GGUFError, RequestError, TemplateError
from trichord.sampling_params import SamplingParams
from trichord.template_presets import PRESETS, Preset
from trichord.template_process import template_process

if TYPE_CHECKING:
    from trichord.gguf_file import GGUFFile
    from trichord.tokenizers import Tokenizer

TIME_LIMIT_SECONDS = 2.0


class ChatTemplate:
    """Renders conversations by one template, in a process of its own, because templates are untrusted code.

    >>> ChatTemplate.from_gguf(file, tokenizer).render([{"role": "user", "content": "Hello"}])
    '<|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n'
    """

    def __init__(
        self,
        source: str,
        bos_token: str = "",
        eos_token: str = "",
        time_limit: float = TIME_LIMIT_SECONDS,
        stop: Sequence[str] = (),
    ) -> None:
        """source: a Jinja template, as Hugging Face's tokenizers have them. time_limit: seconds for each rendering.

        stop: texts that end an answer, besides the tokens that the vocabulary has for it.
        """
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.time_limit = time_limit
        self.stop = list(stop)

    @classmethod
    def from_gguf(
        cls, file: GGUFFile, tokenizer: Tokenizer, instead: str | os.PathLike[str] | None = None
    ) -> ChatTemplate:
        """The file's own template; where it has none, the preset whose marks the vocabulary has, else ChatML.

        instead: the name of a preset (see `trichord.template_presets`) or a file with a Jinja template, to be used
        whatever the file has. Raises TemplateError when the file's entry is no text, or there is no such template.
        """
        bos, eos = ("" if token is None else tokenizer.piece(token) for token in (tokenizer.bos_id, tokenizer.eos_id))
        if instead is None and (own := _own_source(file)):
            return cls(own, bos, eos)
        if instead is not None and instead not in PRESETS:
            return cls(_read(Path(instead)), bos, eos)
        preset = _guess(file, tokenizer) if instead is None else PRESETS[instead]
        return cls(preset.source, bos, eos, stop=preset.stop)

    def with_stops(self, params: SamplingParams | None) -> SamplingParams:
        """The parameters (None: the defaults), ending answers at `stop` as well."""
        params = params or SamplingParams()
        return replace(params, stop=[*params.stop, *self.stop])

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The text of a conversation, by default up to where the model's answer begins.

        messages: dicts with "role" and "content", and whatever else the template knows of. tools: JSON schemas.
        extra: further variables of the template, such as enable_thinking. Raises RequestError for messages that are
        no such thing, TemplateError when the template fails, takes too long or uses too much memory.
        """
        variables = {
            **extra,
            "messages": check_messages(messages),
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
        }
        try:
            request = json.dumps(variables)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"messages, tools and template variables must be plain JSON values: {error}") from None
        return template_process(self.source).render(request, self.time_limit)


def encode_rendered(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of a rendered conversation."""
    ids = tokenizer.encode(text, add_special=True, parse_special=True)
    # Most templates write the beginning-of-sequence token that the tokenizer adds too.
    doubled = tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2
    return ids[1:] if doubled else ids


def _own_source(file: GGUFFile) -> str | None:
    try:
        return file.get("tokenizer.chat_template", str)
    except GGUFError as error:
        raise TemplateError(str(error)) from None


def _guess(file: GGUFFile, tokenizer: Tokenizer) -> Preset:
    """The first preset whose marks are all tokens of the vocabulary."""
    fitting = (
        name
        for name, preset in PRESETS.items()
        if preset.marks and all(tokenizer.token_id(mark) is not None for mark in preset.marks)
    )
    name = next(fitting, None)
    why = "whose marks the vocabulary has" if name else "though the vocabulary has the marks of none"
    name = name or "chatml"
    warnings.warn(f"{file.path.name}: the file has no chat template; using {name}, {why}", stacklevel=3)
    return PRESETS[name]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        names = ", ".join(PRESETS)
        raise TemplateError(f"{path}: there is no such template file, and the templates by name are {names}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise TemplateError(f"{path}: the template cannot be read: {reason}") from None


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the messages. Raises RequestError for what is no list of dicts with "role" and "content"."""
    if not isinstance(messages, (list, tuple)):
        raise RequestError(f"messages must be a list of dicts with 'role' and 'content', not {type(messages).__name__}")
    if not messages:
        raise RequestError("messages is empty: there is nothing to answer")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"message {index} must be a dict with 'role' and 'content', not {message!r:.80}")
        if not isinstance(message.get("role"), str):
            raise RequestError(f"message {index} has no 'role' that is a string, such as 'user'")
        content = message.get("content")
        # A model's call of a tool, and a content in parts, are the template's to understand.
        if not isinstance(content, (str, list)) and not (content is None and set(message) - {"role", "content"}):
            raise RequestError(f"message {index} has no 'content' that is a string")
    return [dict(message) for message in messages]
