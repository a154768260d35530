"""What a GGUF file holds, for programs (`describe`) and for people (`render`): `trichord info`.

Works for every architecture, known or not, and for files with nothing but a vocabulary: what a file does not say, or
says in an unexpected type, is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple, TextIO

import numpy as np

from trichord.gguf_file import GGUFFile, TensorInfo
from trichord.terminal import printable

_MAX_SHOWN = 1000  # characters of one string that people are shown


def describe(file: GGUFFile) -> dict[str, Any]:
    """The file's facts as plain Python values, ready for `json.dumps`; sizes in bytes, shapes in torch's order.

    `layers`, `heads` and `kv_heads` and the like are an int, a list[int] where the file has one value a layer, or None.
    `formats` sums the tensors up by weight format, the largest first; `tensors` lists them in the file's order.
    """
    tensors = list(file.tensors.values())
    parameters = sum(prod(tensor.shape) for tensor in tensors)
    weight_bytes = sum(tensor.nbytes for tensor in tensors)
    architecture = _text(file, "general.architecture")

    def number(name: str) -> int | list[int] | None:
        return _number(file, f"{architecture}.{name}")

    tokens = file.metadata.get("tokenizer.ggml.tokens")
    vocabulary_size = len(tokens) if isinstance(tokens, list) else number("vocab_size")
    return {
        "file": str(file.path),
        "parts": [part.name for part in file.parts],
        "file_bytes": file.nbytes,
        "gguf_version": file.version,
        "name": _text(file, "general.name"),
        "architecture": architecture,
        "parameters": parameters,
        "weight_bytes": weight_bytes,
        "bits_per_weight": round(8 * weight_bytes / parameters, 3) if parameters else None,
        "context_length": number("context_length"),
        "embedding_length": number("embedding_length"),
        "layers": number("block_count"),
        "heads": number("attention.head_count"),
        "kv_heads": number("attention.head_count_kv"),
        "experts": number("expert_count"),
        "experts_used": number("expert_used_count"),
        "tokenizer": {
            "model": _text(file, "tokenizer.ggml.model"),
            "pre": _text(file, "tokenizer.ggml.pre"),
            "vocabulary_size": vocabulary_size,
        },
        "chat_template": "tokenizer.chat_template" in file.metadata,
        "formats": _formats(tensors),
        "tensors": [
            {"name": tensor.name, "shape": list(tensor.shape), "format": tensor.format.name, "bytes": tensor.nbytes}
            for tensor in tensors
        ],
    }


def _text(file: GGUFFile, key: str) -> str | None:
    value = file.metadata.get(key)
    return value if isinstance(value, str) else None


def _number(file: GGUFFile, key: str) -> int | list[int] | None:
    value = file.metadata.get(key)
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        return value.tolist()
    return value if type(value) is int else None


def _formats(tensors: Sequence[TensorInfo]) -> list[dict[str, Any]]:
    formats: dict[str, dict[str, Any]] = {}
    for tensor in tensors:
        empty = {"tensors": 0, "parameters": 0, "bytes": 0, "bits_per_weight": tensor.format.bits_per_weight}
        entry = formats.setdefault(tensor.format.name, {"format": tensor.format.name, **empty})
        entry["tensors"] += 1
        entry["parameters"] += prod(tensor.shape)
        entry["bytes"] += tensor.nbytes
    return sorted(formats.values(), key=lambda entry: -entry["bytes"])


class _Table(NamedTuple):
    """Text in columns; the columns from `left` on hold numbers. Without headings none is shown."""

    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    left: int


def render(description: dict[str, Any], stream: TextIO, tensors: bool = False) -> None:
    """Writes a description for people: tables in a terminal, aligned plain text elsewhere.

    `tensors` adds the list of tensors. Strings of the file are untrusted: control characters, which could drive the
    terminal, appear as their escapes.
    """
    tables = [_Table((), _facts(description), 2)]
    if description["formats"]:
        rows = [
            (
                entry["format"],
                f"{entry['tensors']}",
                _count(entry["parameters"]),
                _size(entry["bytes"]),
                f"{entry['bits_per_weight']:.4g}",
            )
            for entry in description["formats"]
        ]
        tables.append(_Table(("format", "tensors", "weights", "size", "bits per weight"), rows, 1))
    if tensors and description["tensors"]:
        rows = [
            (_shown(entry["name"]), entry["format"], " x ".join(map(str, entry["shape"])), _size(entry["bytes"]))
            for entry in description["tensors"]
        ]
        tables.append(_Table(("tensor", "format", "shape", "size"), rows, 2))
    show = _show_rich if stream.isatty() else _show_plain
    show(tables, stream)


def _facts(description: dict[str, Any]) -> list[tuple[str, ...]]:
    """Label and value of what the file says, leaving out what it does not (converters write 0 for that, too)."""
    tokenizer, parts = description["tokenizer"], description["parts"]
    in_parts = f" in {len(parts)} parts" if len(parts) > 1 else ""
    parameters = description["parameters"]
    weights = f"{_count(parameters)} ({description['bits_per_weight']:.4g} bits each)" if parameters else "none"
    pre = f", pre-tokenizer {tokenizer['pre']}" if tokenizer["pre"] else ""
    size = _size(description["file_bytes"])
    facts = {
        "file": f"{description['file']}, {size}{in_parts}, GGUF version {description['gguf_version']}",
        "name": description["name"],
        "architecture": description["architecture"],
        "parameters": weights,
        "context length": description["context_length"],
        "embedding size": description["embedding_length"],
        "layers": description["layers"],
        "heads": description["heads"],
        "key-value heads": description["kv_heads"],
        "experts": description["experts"],
        "experts per token": description["experts_used"],
        "tokenizer": f"{tokenizer['model']}{pre}" if tokenizer["model"] else None,
        "vocabulary": tokenizer["vocabulary_size"],
        "chat template": "yes" if description["chat_template"] else "no",
    }
    return [(label, _shown(_span(value))) for label, value in facts.items() if value not in (None, [], 0)]


def _span(value: str | int | list[int]) -> str:
    """A value as text; one of many layers as its range."""
    if not isinstance(value, list):
        return str(value)
    low, high = min(value), max(value)
    return str(low) if low == high else f"{low} to {high}, by layer"


def _count(number: int) -> str:
    """A number of weights in decimal units: 8.03 B."""
    for exponent, unit in ((12, "T"), (9, "B"), (6, "M"), (3, "K")):
        if number >= 10**exponent:
            return f"{number / 10**exponent:.2f} {unit}"
    return str(number)


def _size(number: int) -> str:
    """A number of bytes in binary units: 4.58 GiB."""
    for exponent, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if number >= 1 << exponent:
            return f"{number / (1 << exponent):.2f} {unit}"
    return f"{number} B"


def _shown(text: str) -> str:
    """One line of bounded length."""
    return printable(text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "...", allowed="")


def _show_plain(tables: Sequence[_Table], stream: TextIO) -> None:
    for index, table in enumerate(tables):
        if index:
            stream.write("\n")
        lines = [table.headings, *table.rows] if table.headings else table.rows
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            cells = (
                cell.ljust(width) if column < table.left else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            stream.write("  ".join(cells).rstrip() + "\n")


def _show_rich(tables: Sequence[_Table], stream: TextIO) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=stream)
    for table in tables:
        grid = Table(box=SIMPLE_HEAD if table.headings else None, show_header=bool(table.headings), pad_edge=False)
        for column in range(len(table.rows[0])):
            heading = table.headings[column] if table.headings else ""
            numeric = column >= table.left
            grid.add_column(
                heading,
                justify="right" if numeric else "left",
                style="bold" if column == 0 else "",
                no_wrap=numeric,
                overflow="fold",
            )
        for row in table.rows:
            grid.add_row(*map(Text, row))  # Text: brackets in a name are not markup
        console.print(grid)
