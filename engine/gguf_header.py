"""The header of a GGUF file: a checked cursor over its bytes, and the metadata it holds.

A header is untrusted. Every count and length is compared with the file's size before anything is allocated or looped
over, and the header as a whole is bounded, so that a hostile file costs neither memory nor time. Opening only walks
the values; each is decoded when it is first asked for, so a vocabulary that nobody reads costs next to nothing.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Mapping
from enum import IntEnum
from itertools import pairwise
from mmap import mmap
from typing import Any, NoReturn, TypeVar

import numpy as np

from trichord.errors import GGUFError

T = TypeVar("T", int, float, bool, str, list)

MAX_HEADER_BYTES = 1 << 27  # a vocabulary of 262k tokens and 500k merges takes about 20 MB
MAX_VALUES = 1 << 16  # metadata keys, and arrays inside arrays, of one file
MAX_ARRAY_DEPTH = 4
MAX_KEY_BYTES = (1 << 16) - 1  # the specification's own limit


class ValueType(IntEnum):
    """The types a metadata value may have, by their number in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_DTYPES = {
    ValueType.UINT8: np.dtype("<u1"),
    ValueType.INT8: np.dtype("<i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("?"),
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}
_ARRAY_HEAD = struct.Struct("<IQ")  # type and number of the items
_LENGTH = struct.Struct("<Q")
_SMALLEST_ITEM = {kind: dtype.itemsize for kind, dtype in _DTYPES.items()} | {
    ValueType.STRING: _LENGTH.size,
    ValueType.ARRAY: _ARRAY_HEAD.size,
}


def quoted(text: str) -> str:
    """A name from the file as a message may show it: one line, control characters escaped, of bounded length."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


class Header:
    """A cursor over the bytes of one file's header. Each step raises GGUFError rather than leave the file."""

    def __init__(self, data: mmap, file_name: str) -> None:
        self.data = data
        self.position = 0
        self._file_name = file_name
        self._limit = min(len(data), MAX_HEADER_BYTES)
        self._values = 0
        self._string_starts: dict[int, array[int]] = {}

    def fail(self, problem: str) -> NoReturn:
        """Raises GGUFError with the file's name before the problem."""
        raise GGUFError(f"{self._file_name}: {problem}")

    def require_room(self, size: int, what: str) -> None:
        """Raises GGUFError unless `size` bytes from the cursor on lie inside the file and the bounded header."""
        end = self.position + size
        if end <= self._limit:
            return
        if end > len(self.data):
            self.fail(
                f"{what} ends at byte {end}, past the end of the file at {len(self.data)} — is the download complete?"
            )
        self.fail(f"{what} ends at byte {end}, but a header of more than {MAX_HEADER_BYTES} bytes is not read")

    def numbers(self, layout: str, what: str) -> tuple[Any, ...]:
        """The numbers at the cursor, by a `struct` layout; moves past them."""
        size = struct.calcsize(layout)
        self.require_room(size, what)
        values = struct.unpack_from(layout, self.data, self.position)
        self.position += size
        return values

    def name(self, what: str, max_bytes: int) -> str:
        """The string at the cursor, of at most `max_bytes` bytes; moves past it."""
        (length,) = self.numbers("<Q", what)
        self.require_room(length, what)
        if length > max_bytes:
            self.fail(f"{what} is {length} bytes long; the format allows {max_bytes}")
        start, self.position = self.position, self.position + length
        return self.data[start : self.position].decode("utf-8", "surrogateescape")

    def metadata(self, count: int) -> Metadata:
        """The `count` key-value pairs at the cursor, every value checked and none decoded; moves past them."""
        smallest_pair = _LENGTH.size + 4 + 1
        self.require_room(count * smallest_pair, f"the metadata ({count} keys)")
        places: dict[str, tuple[ValueType, int]] = {}
        for index in range(count):
            key = self.name(f"the name of metadata key {index}", MAX_KEY_BYTES)
            what = f"metadata key {quoted(key)}"
            if key in places:
                self.fail(f"{what} occurs twice")
            kind = self._kind(*self.numbers("<I", what), what)
            places[key] = kind, self.position
            self._count_value()
            self._check(kind, 1, what, depth=0)
        return Metadata(self, places)

    def read(self, kind: ValueType, position: int) -> Any:
        """The checked value at `position`."""
        return self._items(kind, 1, position)[0][0]

    def _kind(self, number: int, what: str) -> ValueType:
        try:
            return ValueType(number)
        except ValueError:
            self.fail(f"{what} has value type {number}, which GGUF does not define (0 to {max(ValueType):d} exist)")

    def _check(self, kind: ValueType, count: int, what: str, depth: int) -> None:
        """Walks `count` items of one kind; what passes here can be decoded without a further check."""
        self.require_room(count * _SMALLEST_ITEM[kind], what)
        if kind is ValueType.STRING:
            self._check_strings(count, what)
        elif kind is ValueType.ARRAY:
            if depth == MAX_ARRAY_DEPTH:
                self.fail(f"{what} nests arrays more than {MAX_ARRAY_DEPTH} deep")
            for _ in range(count):
                item_kind, item_count = self.numbers(_ARRAY_HEAD.format, what)
                self._count_value()
                self._check(self._kind(item_kind, what), item_count, what, depth + 1)
        else:
            if kind is ValueType.BOOL and np.any(np.frombuffer(self.data, np.uint8, count, self.position) > 1):
                self.fail(f"{what} holds a byte that is neither 0 nor 1 where a bool belongs; the file is damaged")
            self.position += count * _DTYPES[kind].itemsize

    def _count_value(self) -> None:
        self._values += 1
        if self._values > MAX_VALUES:
            self.fail(f"the metadata holds more than {MAX_VALUES} values")

    def _check_strings(self, count: int, what: str) -> None:
        # The one loop that a large vocabulary makes long: hence local names, and one check after it. A length that
        # leads outside the file makes the next read fail, or the final position lie past the end.
        data, position, length_at = self.data, self.position, _LENGTH.unpack_from
        starts = array("q")
        add = starts.append
        try:
            for _ in range(count):
                add(position)
                position += 8 + length_at(data, position)[0]
        except (struct.error, OverflowError):
            position += 8
        self.require_room(position - self.position, what)
        add(position)
        self._string_starts[self.position] = starts
        self.position = position

    def _items(self, kind: ValueType, count: int, position: int) -> tuple[Any, int]:
        """`count` checked items of one kind from `position` on, and the position after them."""
        if kind is ValueType.STRING:
            starts = np.array(self._string_starts[position])
            return self._strings(starts), int(starts[-1])
        if kind is ValueType.ARRAY:
            arrays = []
            for _ in range(count):
                item_kind, item_count = _ARRAY_HEAD.unpack_from(self.data, position)
                items, position = self._items(ValueType(item_kind), item_count, position + _ARRAY_HEAD.size)
                arrays.append(items)
            return arrays, position
        dtype = _DTYPES[kind]
        # Copied: the map may then be closed, and numbers in a header are rarely aligned.
        return np.frombuffer(self.data, dtype, count, position).copy(), position + count * dtype.itemsize

    def _strings(self, starts: np.ndarray) -> list[str]:
        """The strings whose length fields lie at `starts`, the last of which is the end of the last string.

        All are decoded at once, which takes half the time of decoding each: every length field becomes one byte 0xFF,
        which UTF-8 never uses, and the text is split there. Where the strings hold that byte, each is decoded alone.
        """
        first, end = int(starts[0]), int(starts[-1])
        raw = np.frombuffer(self.data, np.uint8, end - first, first).copy()
        fields = starts[:-1] - first
        keep = np.ones(len(raw), bool)
        for byte in range(1, 8):
            keep[fields + byte] = False
        raw[fields] = 0xFF
        joined = raw[keep].tobytes()
        if joined.count(b"\xff") == len(fields):
            return joined.decode("utf-8", "surrogateescape").split("\udcff")[1:]
        return [
            self.data[start + 8 : end].decode("utf-8", "surrogateescape") for start, end in pairwise(starts.tolist())
        ]


class Metadata(Mapping[str, Any]):
    """The metadata of one file by key, in file order; a value is decoded when it is first read.

    Numbers are int, float or bool, strings str. An array of numbers is a NumPy array of the file's own dtype, an array
    of strings a list[str], an array of arrays a list of these. Bytes that are not UTF-8 (tokens may hold any) become
    lone surrogates: `text.encode("utf-8", "surrogateescape")` gives the exact bytes of any string back.
    """

    def __init__(self, header: Header, places: dict[str, tuple[ValueType, int]]) -> None:
        self._header = header
        self._places = places
        self._decoded: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._decoded:
            kind, position = self._places[key]
            if self._header.data.closed:
                self._header.fail(f"metadata key {quoted(key)} cannot be read after the file was closed")
            value = self._header.read(kind, position)
            self._decoded[key] = value.item() if isinstance(value, np.generic) else value
        return self._decoded[key]

    def typed(self, key: str, kind: type[T], default: T | None = None) -> T | None:
        """The value of `key`, or `default` where there is none. Raises GGUFError when it is not of this kind.

        `kind` is int, float, bool, str, or list for every array. An int serves where a float is wanted, a bool never
        serves as an int.
        """
        if key not in self._places:
            return default
        value = self[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is kind or (kind is list and isinstance(value, np.ndarray)):
            return value
        found = "an array" if isinstance(value, list | np.ndarray) else f"of type {type(value).__name__}"
        wanted = "an array" if kind is list else kind.__name__
        self._header.fail(f"metadata key {quoted(key)} is {found}; {wanted} is expected")

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
