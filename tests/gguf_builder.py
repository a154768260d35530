"""Tiny GGUF files, written byte by byte from the specification, independent of any reader or writer.

The pieces are plain bytes, so a test may damage any of them: `build` puts pairs and tensors together the right way, and
takes whatever counts, offsets or bytes a test wants instead.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
_LAYOUTS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class Tensor(NamedTuple):
    """A tensor to write; `dims` in the file's order (columns first). An offset of None is the next free place."""

    name: str | bytes
    dims: Sequence[int]
    type_id: int
    data: bytes
    offset: int | None = None


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind: int, value: int | float | bool | str | bytes) -> bytes:
    return string(value) if kind == STRING else struct.pack("<" + _LAYOUTS[kind], value)


def array(kind: int, items: Sequence[bytes], count: int | None = None) -> bytes:
    """The payload of an array whose items are already bytes; nested arrays pass `array(...)` as items."""
    return struct.pack("<IQ", kind, len(items) if count is None else count) + b"".join(items)


def pair(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + payload


def text(key: str, value: str | bytes) -> bytes:
    return pair(key, STRING, string(value))


def number(key: str, value: int, kind: int = UINT32) -> bytes:
    return pair(key, kind, scalar(kind, value))


def texts(key: str, values: Sequence[str | bytes]) -> bytes:
    return pair(key, ARRAY, array(STRING, [string(value) for value in values]))


def build(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[Tensor] = (),
    *,
    alignment: int = 32,
    version: int = 3,
    n_pairs: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    """A whole file. `alignment` only lays the data out; a file whose alignment is not 32 must also hold the key."""
    counts = [len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_pairs is None else n_pairs]
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs)
    data = b""
    for tensor in tensors:
        data += bytes(-len(data) % alignment)
        offset = len(data) if tensor.offset is None else tensor.offset
        header += string(tensor.name) + struct.pack(f"<I{len(tensor.dims)}Q", len(tensor.dims), *tensor.dims)
        header += struct.pack("<IQ", tensor.type_id, offset)
        data += tensor.data
    return header + bytes(-len(header) % alignment) + data if tensors else header
