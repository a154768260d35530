"""The command `trichord`: one subcommand a job. Heavy imports wait until a subcommand runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

_EXAMPLES = """\
trichord COMMAND --help tells all about one of them. For example:
  trichord run model.gguf "The capital of France is" -n 20
  trichord chat bartowski/Llama-3.2-1B-Instruct-GGUF
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 1 after an error, 130 after Ctrl-C."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:  # from the first import on: nobody asked for a traceback
        print(file=sys.stderr)
        return 130


def _run(arguments: Sequence[str] | None) -> int:
    import logging
    import warnings

    from trichord.commands.options import in_options
    from trichord.errors import DeviceError, RequestError, TrichordError
    from trichord.hub import find_model
    from trichord.progress import CompileNotice

    options = _parse(arguments)
    warnings.showwarning = _show_warning
    compiling = logging.getLogger("trichord.compile")
    compiling.setLevel(logging.INFO)
    compiling.handlers = [CompileNotice()]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character must not end the run
            stream.reconfigure(errors="replace")
    try:
        if "source" in options:
            options.source = find_model(options.source)
        return options.command(options)
    except (RequestError, DeviceError) as error:
        return _fail(in_options(str(error)))
    except TrichordError as error:
        return _fail(str(error))
    except BrokenPipeError:  # whoever read our output has left
        _discard_output()
        return 1
    except OSError as error:  # files are reported where they are opened: what is left is writing the output
        _discard_output()
        return _fail(f"The output cannot be written: {error.strerror}.")


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
    import argparse

    from trichord import __version__, quantize, split
    from trichord.commands import archs, chat, embed, info, perplexity, run

    table = (
        ("run", "complete a prompt", run.add_arguments, run.run),
        ("chat", "talk with a model", chat.add_arguments, chat.run),
        ("info", "describe a GGUF file", info.add_arguments, info.run),
        ("perplexity", "measure how well a model predicts a text", perplexity.add_arguments, perplexity.run),
        ("embed", "turn texts into vectors", embed.add_arguments, embed.run),
        ("archs", "list the supported model architectures", archs.add_arguments, archs.run),
        ("quantize", "convert a GGUF file to smaller weight formats", quantize.add_arguments, quantize.run),
        ("split", "cut a GGUF file into parts", split.add_split_arguments, split.run_split),
        ("merge", "join the parts of a split GGUF file", split.add_merge_arguments, split.run_merge),
    )
    listed = "\n".join(f"  {name:<13}{what}" for name, what, *_ in table)
    parser = argparse.ArgumentParser(
        prog="trichord",
        usage="trichord [-h] [--version] COMMAND ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Runs GGUF language models, on the GPU through fused Triton kernels or on the CPU.",
        epilog=f"commands:\n{listed}\n\n{_EXAMPLES}",
    )
    parser.add_argument("--version", action="version", version=f"trichord {__version__}")
    commands = parser.add_subparsers(prog="trichord", metavar="COMMAND", required=True, help=argparse.SUPPRESS)
    for name, what, add, command in table:
        subparser = commands.add_parser(name, description=f"{what[0].upper()}{what[1:]}.")
        add(subparser)
        subparser.set_defaults(command=command)
    return parser


def _show_warning(message: Warning | str, *_: object) -> None:
    _say(f"trichord: warning: {message}")


def _discard_output() -> None:
    """Sends what is still buffered nowhere, or the interpreter would complain about it on leaving."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(sentence: str) -> int:
    import contextlib

    with contextlib.suppress(OSError):
        sys.stdout.flush()
    _say(f"trichord: error: {sentence}")
    return 1


def _say(sentence: str) -> None:
    """Writes one line to standard error. Names in it may come from a file or from the network."""
    from trichord.terminal import printable

    print(printable(sentence, allowed=""), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
