"""The GGUF container: a memory-mapped file, its metadata and its table of tensors.

Nothing is copied: `GGUFFile.blocks` gives views of the map, whose pages the system shares between processes. A file is
untrusted input, so everything in it is checked on opening, and whatever is wrong is one GGUFError with the file's name
and the place. Versions 2 and 3, little-endian, of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, alone or split into NAME-00001-of-00003.gguf and so on.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import stat
import sys
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from types import TracebackType

import numpy as np

from trichord.errors import GGUFError
from trichord.gguf_header import Header, Metadata, T, quoted
from trichord.weight_format import WeightFormat

VERSIONS = (2, 3)
MAX_TENSORS = 1 << 20
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
MAX_TENSOR_NAME_BYTES = 64  # GGML_MAX_NAME
DEFAULT_ALIGNMENT = 32

_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)

# What people hand over in place of a GGUF file: the first bytes, what they mean, what to do.
_OTHER_FILES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file it stands for: run `git lfs pull`"),
    (b"PK\x03\x04", "a zip archive (PyTorch checkpoints are): convert the model to GGUF"),
    (b"\x80\x02", "a Python pickle (old PyTorch checkpoints are): convert the model to GGUF"),
    (b"\x1f\x8b", "gzip-compressed: decompress it first"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed: decompress it first"),
    (b"lmgg", "a GGML file from before GGUF: convert the model again"),
    (b"fmgg", "a GGML file from before GGUF: convert the model again"),
    (b"tjgg", "a GGML file from before GGUF: convert the model again"),
    (b"\0\0\0\0", "a file that starts with zeros: is the download complete?"),
)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and what it holds.

    `shape` is in torch's order, the reverse of the file's: (out, in), (experts, out, in) or (n,). `offset` counts from
    the start of the file that is number `part` (from 0) of `GGUFFile.parts`.
    """

    name: str
    shape: tuple[int, ...]
    format: WeightFormat
    nbytes: int
    offset: int
    part: int

    @property
    def rows(self) -> int:
        """Rows in all, over every expert; 1 for a vector."""
        return prod(self.shape[:-1])


class GGUFFile:
    """An open GGUF file, with every part of a split one.

    >>> with GGUFFile("model.gguf") as file:
    ...     file.require("general.architecture", str)
    'llama'
    """

    path: Path
    parts: tuple[Path, ...]
    nbytes: int
    version: int
    metadata: Metadata
    tensors: dict[str, TensorInfo]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens and checks the file, and the other parts if it is any part of a split model.

        Raises GGUFError when a file is missing, unreadable, damaged, or not a GGUF file.
        """
        self.path = Path(path)
        self._parts: list[_Part] = []
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        self.parts = tuple(part.path for part in self._parts)
        self.nbytes = sum(len(part.data) for part in self._parts)
        self.version = self._parts[0].version
        self.metadata = self._parts[0].metadata
        self.tensors = _join_tables(self._parts)

    def get(self, key: str, kind: type[T], default: T | None = None) -> T | None:
        """The metadata value of `key`, or `default` where the file has none: see `Metadata.typed`."""
        return self.metadata.typed(key, kind, default)

    def require(self, key: str, kind: type[T]) -> T:
        """Like `get`, but raises GGUFError where the file has no such key."""
        value = self.get(key, kind)
        if value is None:
            raise GGUFError(f"{self.path.name}: metadata key {quoted(key)} is missing")
        return value

    def blocks(self, name: str) -> np.ndarray:
        """The tensor's bytes as they lie in the file: uint8 (rows, row_bytes), a view of the map, valid while kept.

        The map is copy-on-write: writing into the view is allowed and never reaches the file. Raises GGUFError when
        there is no such tensor or the file was closed.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise GGUFError(f"{self.path.name}: there is no tensor {quoted(name)}")
        if not self._parts:
            raise GGUFError(f"{self.path.name}: tensor {quoted(name)} cannot be read after the file was closed")
        data = self._parts[tensor.part].data
        return np.frombuffer(data, np.uint8, tensor.nbytes, tensor.offset).reshape(tensor.rows, -1)

    def close(self) -> None:
        """Lets go of the maps. Views that are still in use stay valid and keep their map until they are gone."""
        for part in self._parts:
            part.close()
        self._parts = []

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GGUFFile({str(self.path)!r})"

    def _open(self) -> None:
        given = _Part(self.path)
        self._parts.append(given)
        count = given.metadata.typed("split.count", int, 1)
        if count > 1:
            self._parts = []
            for path in _split_paths(given, count):
                self._parts.append(given if path == given.path else _Part(path))
            _check_split(self._parts, count)


class _Part:
    """One file, mapped and checked by itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = _map(path)
        self.header = Header(self.data, path.name)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        with contextlib.suppress(BufferError):  # views of it are in use: the map goes with the last of them
            self.data.close()

    def _read(self) -> None:
        header = self.header
        if self.data[:4] != b"GGUF":
            header.fail(_what_it_is(self.data[:512]))
        _, self.version = header.numbers("<4sI", "the version")
        if self.version and not self.version & 0xFFFF:
            header.fail("this is a big-endian GGUF file; convert it to little-endian (gguf-convert-endian does)")
        if self.version not in VERSIONS:
            header.fail(f"GGUF version {self.version} is not supported (2 and 3 are): convert the model again")
        n_tensors, n_keys = header.numbers("<QQ", "the header")
        self.metadata: Metadata = header.metadata(n_keys)
        self.tensors = self._tensor_table(n_tensors)

    def _alignment(self) -> int:
        value = self.metadata.typed("general.alignment", int, DEFAULT_ALIGNMENT)
        if value < 8 or value & (value - 1):
            self.header.fail(f"general.alignment is {value}; it must be a power of two, 8 or more")
        return value

    def _tensor_table(self, count: int) -> list[TensorInfo]:
        """The tensors in the file's order, `part` left at 0, each inside the file and none over another."""
        header = self.header
        smallest_entry = 8 + 4 + 4 + 8
        header.require_room(count * smallest_entry, f"the table of {count} tensors")
        if count > MAX_TENSORS:
            header.fail(f"the file lists {count} tensors; more than {MAX_TENSORS} are not read")
        alignment = self._alignment()
        entries = [self._tensor_entry(index) for index in range(count)]
        data_start = -(-header.position // alignment) * alignment
        size = len(self.data)
        tensors = []
        for name, shape, format, nbytes, offset in entries:
            start, end = data_start + offset, data_start + offset + nbytes
            if offset % alignment:
                header.fail(f"tensor {quoted(name)} starts at offset {offset}, not a multiple of {alignment}")
            if end > size:
                header.fail(
                    f"tensor {quoted(name)} ends at byte {end}, past the end of the file at {size}"
                    " — is the download complete?"
                )
            tensors.append(TensorInfo(name, shape, format, nbytes, start, part=0))
        in_place = sorted(tensors, key=lambda tensor: tensor.offset)
        for before, after in pairwise(in_place):
            if after.offset < before.offset + before.nbytes:
                header.fail(f"tensor {quoted(after.name)} overlaps tensor {quoted(before.name)}; the file is damaged")
        return tensors

    def _tensor_entry(self, index: int) -> tuple[str, tuple[int, ...], WeightFormat, int, int]:
        """Name, shape, format, bytes, and offset from the start of the data."""
        header = self.header
        name = header.name(f"the name of tensor {index}", MAX_TENSOR_NAME_BYTES)
        what = f"tensor {quoted(name)}"
        entry = f"the entry of {what}"
        (n_dimensions,) = header.numbers("<I", entry)
        if n_dimensions > MAX_DIMENSIONS:
            header.fail(f"{what} has {n_dimensions} dimensions; GGML knows at most {MAX_DIMENSIONS}")
        dimensions = header.numbers(f"<{n_dimensions}Q", entry)
        type_id, offset = header.numbers("<IQ", entry)
        shape = dimensions[::-1] or (1,)  # to GGML a scalar is a vector of one
        if 0 in shape:
            header.fail(f"{what} has the shape {shape}; a dimension cannot be 0")
        try:
            format = WeightFormat.from_ggml_id(type_id)
        except KeyError:
            header.fail(f"{what} has GGML type id {type_id}, which this version of Trichord does not know")
        try:
            nbytes = prod(shape[:-1]) * format.row_bytes(shape[-1])
        except ValueError as error:
            header.fail(f"{what}: {error}")
        return name, shape, format, nbytes, offset


def _map(path: Path) -> mmap.mmap:
    """A copy-on-write map of a regular file: its pages are shared, and torch takes views of it without a warning."""
    try:
        with open(path, "rb", opener=_open_regular) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise GGUFError(f"{path.name}: the file is empty — is the download complete?")
            if sys.platform == "linux":
                # Without MAP_NORESERVE Linux refuses a writable map larger than memory and swap together, though its
                # pages are only ever read. Not every Python has a name for it.
                flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
                access = mmap.PROT_READ | mmap.PROT_WRITE
                return mmap.mmap(file.fileno(), size, flags=flags, prot=access)
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except FileNotFoundError:
        raise GGUFError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise GGUFError(f"{path}: this is a directory; name a .gguf file in it") from None
    except PermissionError:
        raise GGUFError(f"{path}: permission to read the file is denied") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise GGUFError(f"{path}: the file cannot be opened: {error}") from None


def _open_regular(path: str, flags: int) -> int:
    """An opener for `open` that refuses what is not a plain file (a pipe would wait for ever for its writer)."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(path)
    if not stat.S_ISREG(mode):
        raise GGUFError(f"{path}: this is not a regular file")
    return os.open(path, flags)


def _what_it_is(start: bytes) -> str:
    """A sentence on a file that does not start like GGUF, from its first bytes."""
    for magic, meaning in _OTHER_FILES:
        if start.startswith(magic):
            return f"not a GGUF file but {meaning}"
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "not a GGUF file but a web page: download the file itself, not the page that shows it"
    if start[8:9] == b"{":
        return "not a GGUF file but apparently safetensors: convert the model to GGUF"
    if b"GGUF".startswith(start):
        return f"the file ends after {len(start)} bytes — is the download complete?"
    return f"not a GGUF file: it starts with {start[:4]!r} instead of b'GGUF'"


def _split_paths(part: _Part, count: int) -> list[Path]:
    """Where all parts of a split model lie, beside the given one. Raises GGUFError naming the first missing one."""
    match = _SPLIT_NAME.fullmatch(part.path.name)
    if match is None or int(match["count"]) != count:
        part.header.fail(f"a part of a split model in {count} files must be called NAME-00001-of-{count:05}.gguf or so")
    names = [f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    paths = [part.path.with_name(name) for name in names]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        others = f" and {len(missing) - 1} more" if missing[1:] else ""
        part.header.fail(f"of the {count} parts of this split model {missing[0]}{others} is missing beside it")
    return paths


def _check_split(parts: list[_Part], count: int) -> None:
    """Raises GGUFError unless the parts say of themselves what their names say."""
    for index, part in enumerate(parts):
        said = part.metadata.typed("split.no", int), part.metadata.typed("split.count", int)
        if said != (index, count):
            part.header.fail(
                f"by its name this is part {index + 1} of {count}, but its metadata has split.no {said[0]}"
                f" (from 0) and split.count {said[1]}"
            )
    n_tensors = sum(len(part.tensors) for part in parts)
    expected = parts[0].metadata.typed("split.tensors.count", int, n_tensors)
    if expected != n_tensors:
        parts[0].header.fail(f"the {count} parts hold {n_tensors} tensors, not {expected} as part 1 says")


def _join_tables(parts: list[_Part]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for index, part in enumerate(parts):
        for tensor in part.tensors:
            if tensor.name in tensors:
                part.header.fail(f"tensor {quoted(tensor.name)} occurs twice")
            tensors[tensor.name] = TensorInfo(**{**vars(tensor), "part": index})
    return tensors
