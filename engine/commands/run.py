"""`trichord run`: completes a prompt."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trichord.commands import options as shared
from trichord.errors import RequestError
from trichord.hub import find_model, names_model
from trichord.terminal import interruptible, printable, rate

if TYPE_CHECKING:
    from trichord.llm import LLM, TextStream

DEMO_PROMPT = "Once upon a time"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `trichord run`."""
    parser.usage = "trichord run [MODEL] [PROMPT] [options]"
    parser.description = "Complete a prompt, taken as it is: `trichord chat` lays a conversation out for the model."
    parser.add_argument(
        "words",
        nargs="*",
        metavar="[MODEL] [PROMPT]",
        help=f"MODEL: {shared.MODEL_HELP} (default: the demo model). PROMPT: the text to continue, in quotes"
        " (default: standard input)",
    )
    parser.add_argument(
        "-f", "--file", type=Path, metavar="FILE", help="read the prompt from a file ('-': standard input)"
    )
    shared.add_sampling(parser, max_tokens=256)
    shared.add_machine(parser)


def run(options: argparse.Namespace) -> int:
    """Streams the completion to standard output and a summary to standard error; returns the exit status."""
    model, prompt = _model_and_prompt(options)
    params = shared.sampling_params(options)
    llm = shared.load_model(options, model, options.context)
    stream = llm.stream(prompt, params)
    status = 0
    on_terminal = sys.stdout.isatty()
    if on_terminal:
        print(f"\x1b[2m{printable(prompt)}\x1b[22m", end="", flush=True)
    try:
        for piece in interruptible(stream):
            print(printable(piece) if on_terminal else piece, end="", flush=True)
    except KeyboardInterrupt:
        stream.close()
        status = 130
    print(flush=True)
    print(_summary(llm, stream), file=sys.stderr)
    return status


def _model_and_prompt(options: argparse.Namespace) -> tuple[str | None, str]:
    words = list(options.words)
    # A single word is the model when it looks like one: prompts are seldom files.
    model = words.pop(0) if len(words) > 1 or (words and names_model(words[0])) else None
    if len(words) > 1:
        raise RequestError("One model and one prompt are expected: put quotes around a prompt of several words.")
    if words and options.file:
        raise RequestError("The prompt was given twice, as an argument and with --file.")
    if model is not None:
        model = str(find_model(model))  # before standard input is waited for
    if words:
        return model, words[0]
    prompt = _read_prompt(options.file)
    if not prompt and model is None and options.file is None:
        prompt = DEMO_PROMPT
    if not prompt:
        raise RequestError("The prompt is empty: give it as an argument, with --file or on standard input.")
    return model, prompt


def _read_prompt(file: Path | None) -> str:
    try:
        if file is not None and str(file) != "-":
            return file.read_text(encoding="utf-8").removesuffix("\n")
        if sys.stdin is None or sys.stdin.isatty():
            return ""
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except OSError as error:
        raise RequestError(f"The prompt cannot be read from {file or 'standard input'}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"The prompt is not UTF-8 text: byte {error.start} is invalid.") from None


def _summary(llm: LLM, stream: TextStream) -> str:
    output = stream.output
    prompt, generated = len(output.prompt_token_ids), len(output.outputs[0].token_ids)
    parts = [f"load {llm.load_seconds:.2f} s", f"prompt {prompt} tokens{rate(prompt, stream.prompt_seconds)}"]
    # The first token comes with the prompt's step.
    parts.append(f"generation {generated} tokens{rate(generated - 1, stream.generation_seconds)}")
    parts.append(f"weights {llm.weight_bytes / 2**20:.1f} MiB resident")
    return " · ".join(parts)
