"""`trichord archs`: lists the supported architectures."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `trichord archs`."""
    parser.description = "List the model architectures that can be run, as `general.architecture` names them in a file."
    parser.add_argument("--json", action="store_true", help="print a JSON list of names with what is special of each")


def run(options: argparse.Namespace) -> int:
    """Prints the table."""
    from trichord.models.architectures import ARCHITECTURES
    from trichord.models.record import describe

    table = {name: describe(ARCHITECTURES[name]) for name in sorted(ARCHITECTURES)}
    if options.json:
        print(json.dumps(table, indent=2))
        return 0
    width = max(map(len, table))
    for name, features in table.items():
        print(f"{name:{width}}  {', '.join(features)}".rstrip())
    return 0
