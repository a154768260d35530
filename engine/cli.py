"""The command `trichord`: one subcommand a job. Heavy imports wait until a subcommand runs."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trichord import __version__, quantize, split
from trichord.errors import RequestError, TrichordError

if TYPE_CHECKING:
    from trichord.llm import LLM, TextStream

DEMO_PROMPT = "Once upon a time"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 1 after an error, 130 after Ctrl-C."""
    options = _parse(arguments)
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character must not end the run
            stream.reconfigure(errors="replace")
    try:
        return options.command(options)
    except TrichordError as error:
        return _fail(str(error))
    except BrokenPipeError:  # whoever read our output has left
        _discard_output()
        return 1
    except OSError as error:  # files are reported where they are opened: what is left is writing the output
        _discard_output()
        return _fail(f"The output cannot be written: {error.strerror}.")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line. `run` takes its words before, between and after its options, which argparse does not."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and ("words" not in options or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.words += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trichord",
        description="Runs GGUF language models, on the GPU through fused Triton kernels or on the CPU.",
    )
    parser.add_argument("--version", action="version", version=f"trichord {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, what, add, command in (
        ("run", "complete a prompt", _add_run_arguments, _run),
        ("info", "describe a GGUF file", _add_info_arguments, _info),
        ("quantize", "convert a GGUF file to smaller weight formats", quantize.add_arguments, quantize.run),
        ("split", "cut a GGUF file into parts", split.add_split_arguments, split.run_split),
        ("merge", "join the parts of a split GGUF file", split.add_merge_arguments, split.run_merge),
    ):
        subparser = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        add(subparser)
        subparser.set_defaults(command=command)
    return parser


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "trichord run [MODEL.gguf] [PROMPT] [options]"
    parser.add_argument(
        "words",
        nargs="*",
        metavar="[MODEL.gguf] [PROMPT]",
        help="the model's file (default: the demo model) and the prompt (default: standard input)",
    )
    parser.add_argument(
        "-f", "--file", type=Path, metavar="FILE", help="read the prompt from a file ('-': standard input)"
    )
    parser.add_argument(
        "-n",
        "--max-tokens",
        type=int,
        default=256,
        metavar="N",
        help="tokens to generate at most (default: %(default)s; -1: to the context's end)",
    )
    sampling = parser.add_argument_group("sampling")
    number = _option(sampling)
    number("--temp", float, 0.8, "temperature; 0 always takes the likeliest token")
    number("--top-k", int, 40, "draw from the K likeliest tokens; 0: from all")
    number("--top-p", float, 0.95, "draw from the likeliest tokens that hold this probability together")
    number("--min-p", float, 0.05, "leave out tokens below this share of the likeliest one's probability")
    number("--repeat-penalty", float, 1.0, "divide the logits of tokens seen before; 1: do not")
    number("--seed", int, None, "make the draws repeatable")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="go on past the model's own end")
    machine = parser.add_argument_group("machine")
    number = _option(machine)
    machine.add_argument(
        "--device",
        default="auto",
        metavar="auto|cuda|cpu",
        help="where to run; cuda:N picks a GPU (default: %(default)s)",
    )
    machine.add_argument(
        "--precision",
        default="default",
        choices=("exact", "default", "fast"),
        help="float32, 16-bit or 8-bit activations (default: %(default)s)",
    )
    number("--gpu-layers", int, None, "put only the last N layers on the GPU")
    number("--threads", int, None, "CPU threads")
    number("--ctx", int, None, "context length, to save memory")
    machine.add_argument("--kv-dtype", choices=("f32", "f16"), help="number format of the key-value cache")


def _option(group: argparse._ArgumentGroup) -> Callable[[str, type, object, str], None]:
    def add(name: str, kind: type, default: object, what: str) -> None:
        shown = "" if default is None else " (default: %(default)s)"
        group.add_argument(name, type=kind, default=default, metavar="N" if kind is int else "X", help=what + shown)

    return add


def _run(options: argparse.Namespace) -> int:
    from trichord.llm import LLM
    from trichord.sampling_params import SamplingParams

    model, prompt = _model_and_prompt(options)
    params = SamplingParams(
        temperature=options.temp,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repeat_penalty,
        seed=options.seed,
        stop=options.stop,
        ignore_eos=options.ignore_eos,
        max_tokens=None if options.max_tokens == -1 else options.max_tokens,
    )
    llm = LLM(
        model,
        device=options.device,
        precision=options.precision,
        context_length=options.ctx,
        gpu_layers=options.gpu_layers,
        kv_dtype=options.kv_dtype,
        threads=options.threads,
        max_sequences=1,
    )
    stream = llm.stream(prompt, params)
    status = 0
    if sys.stdout.isatty():
        print(f"\x1b[2m{printable(prompt)}\x1b[22m", end="", flush=True)
    try:
        for piece in stream:
            print(printable(piece) if sys.stdout.isatty() else piece, end="", flush=True)
    except KeyboardInterrupt:
        stream.close()
        status = 130
    print(flush=True)
    print(_summary(llm, stream), file=sys.stderr)
    return status


def _model_and_prompt(options: argparse.Namespace) -> tuple[str | None, str]:
    words = list(options.words)
    # A single word is the model when it looks like one: prompts are seldom files.
    model = words.pop(0) if len(words) > 1 or (words and _is_model(words[0])) else None
    if len(words) > 1:
        raise RequestError("One model and one prompt are expected: put quotes around a prompt of several words.")
    if words and options.file:
        raise RequestError("The prompt was given twice, as an argument and with --file.")
    if words:
        return model, words[0]
    prompt = _read_prompt(options.file)
    if not prompt and model is None and options.file is None:
        prompt = DEMO_PROMPT
    if not prompt:
        raise RequestError("The prompt is empty: give it as an argument, with --file or on standard input.")
    return model, prompt


def _is_model(word: str) -> bool:
    return word.lower().endswith(".gguf") or Path(word).exists()


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
    parts = [f"load {llm.load_seconds:.2f} s", f"prompt {prompt} tokens{_rate(prompt, stream.prompt_seconds)}"]
    # The first token comes with the prompt's step.
    parts.append(f"generation {generated} tokens{_rate(generated - 1, stream.generation_seconds)}")
    parts.append(f"weights {llm.weight_bytes / 2**20:.1f} MiB resident")
    return " · ".join(parts)


def _rate(tokens: int, seconds: float) -> str:
    return f", {tokens / seconds:.1f} tokens/s" if tokens > 0 and seconds > 0 else ""


def _add_info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.gguf", help="the file, any part of a split one")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _info(options: argparse.Namespace) -> int:
    import json

    from trichord.gguf_file import GGUFFile
    from trichord.info import describe, render

    with GGUFFile(options.model) as file:
        description = describe(file)
        if options.json:
            print(json.dumps(description, indent=2))
        else:
            render(description, sys.stdout, options.tensors)
    return 0


def printable(text: str) -> str:
    """Text for a terminal: control characters, which could drive it, are shown as their code."""

    def shown(character: str) -> str:
        harmless = character in "\n\t" or character.isprintable() or (character.isspace() and character > " ")
        return character if harmless else ascii(character)[1:-1]

    return "".join(map(shown, text))


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"trichord: warning: {message}", file=sys.stderr)


def _discard_output() -> None:
    """Sends what is still buffered nowhere, or the interpreter would complain about it on leaving."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(sentence: str) -> int:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(f"trichord: error: {sentence}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
