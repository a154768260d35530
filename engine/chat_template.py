"""The chat template of a GGUF file: a conversation to the text that the model was trained to continue."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trichord.errors import GGUFError, RequestError, TemplateError
from trichord.template_process import template_process

if TYPE_CHECKING:
    from trichord.gguf_file import GGUFFile
    from trichord.tokenizers import Tokenizer

TIME_LIMIT_SECONDS = 2.0

_CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\n' + (message.content or '') + '<|im_end|>\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}
"""
_PLAIN = """\
{{ bos_token }}
{%- for message in messages %}
{{ message.role + ': ' + (message.content or '') + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ 'assistant:' }}
{%- endif %}
"""


class ChatTemplate:
    """Renders conversations by one template, in a process of its own, because templates are untrusted code.

    >>> ChatTemplate.from_gguf(file, tokenizer).render([{"role": "user", "content": "Hello"}])
    '<|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n'
    """

    def __init__(
        self, source: str, bos_token: str = "", eos_token: str = "", time_limit: float = TIME_LIMIT_SECONDS
    ) -> None:
        """source: a Jinja template, as Hugging Face's tokenizers have them. time_limit: seconds for each rendering."""
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.time_limit = time_limit

    @classmethod
    def from_gguf(cls, file: GGUFFile, tokenizer: Tokenizer) -> ChatTemplate:
        """The file's own template; where it has none, ChatML if the vocabulary has its marks, else plain lines."""
        try:
            source = file.get("tokenizer.chat_template", str)
        except GGUFError as error:
            raise TemplateError(str(error)) from None
        if not source:
            chatml = tokenizer.token_id("<|im_start|>") is not None
            source = _CHATML if chatml else _PLAIN
            layout = "ChatML, whose marks the vocabulary has" if chatml else "plain lines of 'role: content'"
            warnings.warn(f"{file.path.name}: the file has no chat template; using {layout}", stacklevel=2)
        bos, eos = ("" if token is None else tokenizer.piece(token) for token in (tokenizer.bos_id, tokenizer.eos_id))
        return cls(source, bos, eos)

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
            "messages": _checked(messages),
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


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
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
