"""Splitting a GGUF file into parts and merging parts into one file: `trichord split`, `trichord merge`.

Parts are named and marked as llama.cpp's gguf-split does: NAME-00001-of-00003.gguf and so on, the metadata in the
first, and in each `split.no` (from 0), `split.count` and `split.tensors.count`. Tensors keep order and bytes.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from trichord.errors import RequestError
from trichord.gguf_file import GGUFFile, TensorInfo
from trichord.gguf_header import ValueType
from trichord.gguf_writer import (
    ALIGNMENT_KEY,
    SPLIT_KEYS,
    GGUFStream,
    NewTensor,
    alignment_of,
    file_bytes,
    integer_pair,
    metadata_pairs,
    new_files,
    padded,
    unwinding_on_sigterm,
)
from trichord.progress import progress_bar

DEFAULT_MAX_TENSORS = 128
MAX_PARTS = 65535  # split.count is a uint16, and the name has five digits

_SPLIT_TYPES = (ValueType.UINT16, ValueType.UINT16, ValueType.INT32)
_COPIED_AT_A_TIME = 1 << 24
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def split_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    max_tensors: int | None = None,
    max_bytes: int | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> list[Path]:
    """Splits `source` into TARGET-00001-of-0000N.gguf and so on; returns their paths.

    A part holds at most `max_tensors` tensors (128 if neither limit is given) and at most `max_bytes` bytes of tensors,
    though never less than one tensor. The parts appear when all are complete. force: replace files of these names.
    progress: show a bar on standard error; None shows it in a terminal.

    Raises RequestError when a limit is not positive or a part cannot be written, GGUFError when `source` is damaged.
    """
    if max_tensors is None and max_bytes is None:
        max_tensors = DEFAULT_MAX_TENSORS
    for what, limit in (("tensors", max_tensors), ("bytes", max_bytes)):
        if limit is not None and limit < 1:
            raise RequestError(f"parts of at most {limit} {what} cannot hold anything; give a positive number")
    with GGUFFile(source) as file:
        groups = _groups(list(file.tensors.values()), max_tensors, max_bytes, alignment_of(file))
        if len(groups) > MAX_PARTS:
            raise RequestError(f"these limits would make {len(groups)} parts; at most {MAX_PARTS} can be numbered")
        stem = re.sub(r"\.gguf$", "", os.fspath(target))
        targets = [Path(f"{stem}-{index + 1:05}-of-{len(groups):05}.gguf") for index in range(len(groups))]
        whole = _without_split_keys(file)
        alone = [pair for key, pair in whole.items() if key == ALIGNMENT_KEY]
        pairs = [
            [*(alone if index else whole.values()), *_split_pairs(index, len(groups), len(file.tensors))]
            for index in range(len(groups))
        ]
        _write(file, targets, pairs, groups, f"Splitting into {len(groups)}", force, progress)
    return targets


def merge_files(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: bool | None = None,
) -> Path:
    """Merges all parts of the split model that `source` is a part of into the file `target`; returns its path.

    Metadata and tensors are those of the file before it was split. force: replace `target`. Raises RequestError when
    `source` is not a part of a split model or `target` cannot be written, GGUFError when a part is missing or damaged.
    """
    with GGUFFile(source) as file:
        if "split.count" not in file.metadata:
            raise RequestError(f"{source}: this file is not a part of a split model")
        pairs = [list(_without_split_keys(file).values())]
        groups = [list(file.tensors.values())]
        _write(file, [Path(target)], pairs, groups, f"Merging {len(file.parts)} parts", force, progress)
    return Path(target)


def _groups(
    tensors: list[TensorInfo], max_tensors: int | None, max_bytes: int | None, alignment: int
) -> list[list[TensorInfo]]:
    """The tensors of each part; a file without tensors is one part."""
    groups: list[list[TensorInfo]] = [[]]
    used = 0
    for tensor in tensors:
        nbytes = padded(tensor.nbytes, alignment)
        full = max_tensors is not None and len(groups[-1]) == max_tensors
        if groups[-1] and (full or (max_bytes is not None and used + nbytes > max_bytes)):
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += nbytes
    return groups


def _without_split_keys(file: GGUFFile) -> dict[str, bytes]:
    return {key: pair for key, pair in metadata_pairs(file).items() if key not in SPLIT_KEYS}


def _split_pairs(index: int, parts: int, tensors: int) -> Iterator[bytes]:
    for key, kind, value in zip(SPLIT_KEYS, _SPLIT_TYPES, (index, parts, tensors), strict=True):
        yield integer_pair(key, kind, value)


def _write(
    file: GGUFFile,
    targets: list[Path],
    pairs: Sequence[Sequence[bytes]],
    groups: Sequence[Sequence[TensorInfo]],
    title: str,
    force: bool,
    progress: bool | None,
) -> None:
    """Copies each group of tensors into its target."""
    alignment = alignment_of(file)
    tables = [[NewTensor(tensor.name, tensor.shape, tensor.format) for tensor in group] for group in groups]
    nbytes = sum(file_bytes(pair, table, alignment) for pair, table in zip(pairs, tables, strict=True))
    total = sum(tensor.nbytes for tensor in file.tensors.values())
    with (
        new_files(file, targets, nbytes, force) as temporary,
        progress_bar(title, total, "bytes", progress) as advance,
    ):
        for path, own_pairs, table in zip(temporary, pairs, tables, strict=True):
            with GGUFStream(path, own_pairs, table, alignment) as stream:
                for tensor in table:
                    data = file.blocks(tensor.name).reshape(-1)
                    for start in range(0, len(data), _COPIED_AT_A_TIME):
                        piece = data[start : start + _COPIED_AT_A_TIME]
                        stream.write(piece)
                        advance(len(piece))


def add_split_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `trichord split`."""
    parser.add_argument("source", metavar="IN.gguf", help="the file to split")
    parser.add_argument("target", metavar="NAME", help="the parts are called NAME-00001-of-00003.gguf and so on")
    parser.add_argument(
        "--max-tensors",
        type=int,
        metavar="N",
        help=f"tensors in a part at most (default: {DEFAULT_MAX_TENSORS}, unless --max-size is given)",
    )
    parser.add_argument("--max-size", metavar="SIZE", help="bytes of tensors in a part at most: 500M, 2G")
    parser.add_argument("--force", action="store_true", help="replace parts that exist")


def run_split(options: argparse.Namespace) -> int:
    """`trichord split`: returns the exit status."""
    max_bytes = None if options.max_size is None else _parse_size(options.max_size)
    with unwinding_on_sigterm():
        paths = split_file(
            options.source, options.target, max_tensors=options.max_tensors, max_bytes=max_bytes, force=options.force
        )
    for path in paths:
        print(path)
    return 0


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `trichord merge`."""
    parser.add_argument("source", metavar="IN-00001-of-00003.gguf", help="any part of a split model")
    parser.add_argument("target", metavar="OUT.gguf", help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace OUT.gguf if it exists")


def run_merge(options: argparse.Namespace) -> int:
    """`trichord merge`: returns the exit status."""
    with unwinding_on_sigterm():
        print(merge_files(options.source, options.target, force=options.force))
    return 0


def _parse_size(text: str) -> int:
    """Bytes of a size such as 500M or 2G, in decimal units."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.strip().upper())
    if match is None:
        raise RequestError(f"{text!r} is not a size; write 500M or 2G")
    return int(float(match[1]) * _UNITS[match[2]])
