"""The process in which a chat template runs: a script of its own, started by trichord.template_process.

A template comes with a model file, so it is untrusted code. It runs in Jinja's sandbox, in a process whose memory is
bounded, which writes no file, and which its parent kills when it takes too long.

Each line of standard input is a JSON object and is answered by one: the first, {"path", "source", "max_characters"},
by {}; every other, the template's variables, by {"text"} or {"error"}, a sentence. Nothing of trichord is imported.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any, NoReturn

MAX_MEMORY_BYTES = 512 << 20
MAX_ERROR_CHARACTERS = 400


def main() -> None:
    """Answers until standard input ends, as it does when the parent is gone."""
    start = json.loads(sys.stdin.buffer.readline())
    sys.path[:] = start["path"]  # the parent's, where Jinja is found
    environment = make_environment()
    limit_resources()
    answer({})
    template = None
    for line in sys.stdin.buffer:
        try:
            template = template or environment.from_string(start["source"])
            answer({"text": rendered(template, json.loads(line), start["max_characters"])})
        except Exception as error:  # whatever the template manages to raise is its own fault
            answer({"error": sentence(error)})


def answer(message: dict[str, str]) -> None:
    """Writes one line to the parent."""
    sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")
    sys.stdout.buffer.flush()


def make_environment() -> Any:
    """What chat templates may use, as Hugging Face's transformers sets it up, whose templates these are.

    https://github.com/huggingface/transformers/blob/main/src/transformers/utils/chat_template_utils.py
    """
    from jinja2.exceptions import SecurityError, TemplateRuntimeError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        """Jinja's, but what is forbidden is an error at once instead of an undefined value that prints as nothing."""

        def unsafe_undefined(self, obj: object, attribute: str) -> NoReturn:
            raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} is forbidden")

    class Generation(Extension):
        """`{% generation %}` marks what a model wrote, for training; here it changes nothing."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: object) -> NoReturn:
        raise TemplateRuntimeError(f"raised by the template: {message}")

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    def tojson(value: object, **options: Any) -> str:
        # Not Jinja's own, which escapes what HTML escapes.
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment


def limit_resources() -> None:
    """Bounds memory and forbids writing files, where the system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    limits = {resource.RLIMIT_AS: MAX_MEMORY_BYTES, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    for limit, value in limits.items():
        try:
            resource.setrlimit(limit, (value, value))
        except (OSError, ValueError):  # macOS has no limit on memory; the limit on time remains
            continue


def rendered(template: Any, variables: dict[str, Any], max_characters: int) -> str:
    """The template's text. Raises whatever the template does, and OverflowError when it writes too much."""
    pieces, length = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        length += len(piece)
        if length > max_characters:
            raise OverflowError(f"it writes more than {max_characters} characters")
    return "".join(pieces)


def sentence(error: Exception) -> str:
    """What went wrong, in one line."""
    from jinja2 import TemplateError, TemplateSyntaxError

    if isinstance(error, MemoryError):
        return f"it needs more than {MAX_MEMORY_BYTES >> 20} MiB of memory"
    if isinstance(error, RecursionError):
        return "it nests or calls itself too deeply"
    text = " ".join(str(error).split())[:MAX_ERROR_CHARACTERS]
    if isinstance(error, TemplateSyntaxError):
        return f"syntax error in line {error.lineno}: {text}"
    return text if isinstance(error, (TemplateError, OverflowError)) else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    main()
