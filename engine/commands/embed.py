"""`trichord embed`: turns texts into vectors."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from trichord.commands import options as shared
from trichord.errors import RequestError
from trichord.hub import find_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `trichord embed`."""
    parser.description = (
        "Turn texts into vectors, one a line of output as a JSON list. Texts are arguments, or the lines of a file or"
        " of standard input."
    )
    parser.add_argument("model", metavar="MODEL", help=shared.MODEL_HELP)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts to embed")
    parser.add_argument("-f", "--file", type=Path, metavar="FILE", help="a UTF-8 file with a text on every line")
    parser.add_argument(
        "--pooling",
        choices=("mean", "first", "last"),
        help="how a text's states become one vector (default: as the model says)",
    )
    parser.add_argument("--no-normalize", action="store_true", help="leave vectors at their length, not at 1")
    shared.add_machine(parser)


def run(options: argparse.Namespace) -> int:
    """Prints the vectors."""
    model = str(find_model(options.model))
    texts = _texts(options)
    llm = shared.load_model(options, model, options.context, max_sequences=16)
    vectors = llm.embed(texts, pooling=options.pooling, normalize=not options.no_normalize)
    for vector in vectors:
        print(json.dumps([round(float(x), 7) for x in vector]))
    return 0


def _texts(options: argparse.Namespace) -> list[str]:
    if options.texts and options.file:
        raise RequestError("Texts come as arguments or from --file, not both.")
    if options.texts:
        return options.texts
    try:
        text = options.file.read_text("utf-8") if options.file else sys.stdin.read()
    except OSError as error:
        raise RequestError(f"{options.file} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{options.file or 'Standard input'} is not UTF-8 text (byte {error.start}).") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise RequestError("There is no text to embed.")
    return lines
