"""Writing GGUF files: metadata and a table of tensors, then the tensors as a stream, in bounded memory.

Files appear under their names only when all are complete; until then they lie beside them under temporary ones.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import signal
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import numpy as np

from trichord.errors import RequestError
from trichord.gguf_file import DEFAULT_ALIGNMENT, GGUFFile
from trichord.gguf_header import Header, ValueType
from trichord.weight_format import WeightFormat

ALIGNMENT_KEY = "general.alignment"
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")  # uint16 (from 0), uint16, int32

_INTEGERS = {
    ValueType.UINT16: "<H",
    ValueType.UINT32: "<I",
    ValueType.INT32: "<i",
}


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written; `shape` in torch's order."""

    name: str
    shape: tuple[int, ...]
    format: WeightFormat

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        return prod(self.shape[:-1]) * self.format.row_bytes(self.shape[-1])


def metadata_pairs(file: GGUFFile) -> dict[str, bytes]:
    """Each metadata pair of a file (of the first part of a split one) exactly as it lies there, by key, in order."""
    with open(file.parts[0], "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = Header(data, file.parts[0].name)
        _, _, _, count = header.numbers("<4sIQQ", "the header")
        pairs = {}
        for _ in range(count):
            start = header.position
            (key,) = header.metadata(1)
            pairs[key] = data[start : header.position]
        return pairs


def integer_pair(key: str, kind: ValueType, value: int) -> bytes:
    """A metadata pair of an integer, as it lies in a file."""
    return _string(key) + struct.pack("<I", kind) + struct.pack(_INTEGERS[kind], value)


def alignment_of(file: GGUFFile) -> int:
    """The multiple of bytes at which a file's tensors start."""
    return file.get(ALIGNMENT_KEY, int, DEFAULT_ALIGNMENT)


def padded(nbytes: int, alignment: int) -> int:
    """Bytes up to where the next tensor may start."""
    return -(-nbytes // alignment) * alignment


class GGUFStream:
    """One file being written: `write` takes the tensors' bytes in the order of the table, in pieces of any size.

    pairs: metadata as `metadata_pairs` and `integer_pair` give it; where the alignment is not 32 it must say so.
    """

    def __init__(self, path: Path, pairs: Sequence[bytes], tensors: Sequence[NewTensor], alignment: int) -> None:
        self._alignment = alignment
        self._left = [tensor.nbytes for tensor in reversed(tensors)]
        header = _header(pairs, tensors, alignment)
        self._file = open(path, "xb")  # noqa: SIM115 (closed by __exit__)
        self._file.write(header)

    def write(self, data: bytes | np.ndarray) -> None:
        """The next bytes of the tensor under way; a piece never reaches into the next tensor."""
        self._file.write(data)
        self._left[-1] -= len(data) if isinstance(data, bytes) else data.nbytes
        if self._left[-1] == 0:
            self._left.pop()
            self._file.write(bytes(-self._file.tell() % self._alignment))

    def __enter__(self) -> GGUFStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def file_bytes(pairs: Sequence[bytes], tensors: Sequence[NewTensor], alignment: int) -> int:
    """The size of the file that a `GGUFStream` writes."""
    return len(_header(pairs, tensors, alignment)) + sum(padded(tensor.nbytes, alignment) for tensor in tensors)


@contextlib.contextmanager
def new_files(source: GGUFFile, targets: Sequence[Path], nbytes: int, force: bool = False) -> Iterator[list[Path]]:
    """Yields a temporary path beside each target; afterwards all become their targets, or after an error none.

    source: what they are made from, which none may replace. nbytes: what all will take together. Raises RequestError
    when a target exists already (unless `force`), cannot be written, or there is no room for it.
    """
    temporary = [target.with_name(f"{target.name}.{os.getpid()}.tmp") for target in targets]
    try:
        for target in targets:
            _check_target(target, source, force)
        free = shutil.disk_usage(targets[0].parent).free
        if free < nbytes:
            raise RequestError(f"{targets[0]}: the disk has {free:,} bytes left, and {nbytes:,} are needed")
        yield temporary
        for path, target in zip(temporary, targets, strict=True):
            os.replace(path, target)
    except OSError as error:
        raise RequestError(f"{targets[0]}: the file cannot be written: {_reason(error)}") from error
    finally:
        for path in temporary:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _check_target(target: Path, source: GGUFFile, force: bool) -> None:
    if target.is_dir():
        raise RequestError(f"{target}: this is a directory; name the file to write")
    if not target.exists():
        return
    if not target.is_file():
        raise RequestError(f"{target}: this is a device or a pipe, which a file cannot replace; name another target")
    if any(part.samefile(target) for part in source.parts):
        raise RequestError(f"{target}: a file cannot be replaced by what is made from it; name another target")
    if not force:
        raise RequestError(f"{target}: the file exists already (--force replaces it)")


@contextlib.contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """For commands: `kill` and `timeout` end the block like an exception, so that no temporary file stays behind."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _reason(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "the disk is full"
    if isinstance(error, FileNotFoundError):
        return "its directory does not exist"
    if isinstance(error, PermissionError):
        return "permission is denied"
    return error.strerror or str(error)


def _header(pairs: Sequence[bytes], tensors: Sequence[NewTensor], alignment: int) -> bytes:
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(pairs)), *pairs]
    offset = 0
    for tensor in tensors:
        dimensions = tensor.shape[::-1]
        fields = struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, tensor.format.ggml_id, offset)
        parts += [_string(tensor.name), fields]
        offset += padded(tensor.nbytes, alignment)
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw
