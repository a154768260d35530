"""`trichord info`: describes a GGUF file."""

from __future__ import annotations

import argparse
import json
import sys

from trichord.commands.options import MODEL_HELP
from trichord.gguf_file import GGUFFile
from trichord.hub import find_model
from trichord.info import describe, render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `trichord info`."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Prints the description; returns the exit status."""
    with GGUFFile(find_model(options.model)) as file:
        description = describe(file)
    if options.json:
        print(json.dumps(description, indent=2))
    else:
        render(description, sys.stdout, options.tensors)
    return 0
