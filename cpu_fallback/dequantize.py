"""Dequantization in NumPy: packed rows to float32, whole arrays at a time."""

from __future__ import annotations

import numpy as np

from trichord.cpu_fallback.decode import DECODERS, chunk
from trichord.weight_format import WeightFormat

_PLAIN = {
    WeightFormat.I8: "i1",
    WeightFormat.I16: "<i2",
    WeightFormat.I32: "<i4",
    WeightFormat.I64: "<i8",
}

_TILE_BYTES = 1 << 20
"""Packed bytes decoded at a time: the intermediate arrays stay in the cache."""


class NumpyBlock:
    """The vectors of a decode function (see `decode`) over many blocks at once: uint8 (blocks, block_bytes)."""

    def __init__(self, data: np.ndarray) -> None:
        self._data = data

    def _load(self, offset: int, count: int, dtype: str) -> np.ndarray:
        size = np.dtype(dtype).itemsize
        return self._data[:, offset : offset + count * size].view(dtype)

    def u8(self, offset: int, count: int = 1) -> np.ndarray:
        """Unsigned bytes."""
        return self._load(offset, count, "u1")

    def i8(self, offset: int, count: int = 1) -> np.ndarray:
        """Signed bytes."""
        return self._load(offset, count, "i1")

    def u16(self, offset: int, count: int = 1) -> np.ndarray:
        """Unsigned numbers of 16 bits."""
        return self._load(offset, count, "<u2")

    def u32(self, offset: int, count: int = 1) -> np.ndarray:
        """Unsigned numbers of 32 bits."""
        return self._load(offset, count, "<u4")

    def f16(self, offset: int, count: int = 1) -> np.ndarray:
        """IEEE halves, as float32."""
        return self.half(self.u16(offset, count))

    def bf16(self, offset: int, count: int = 1) -> np.ndarray:
        """The upper halves of float32 numbers, as float32."""
        return (self.u16(offset, count).astype(np.uint32) << 16).view(np.float32)

    def f32(self, offset: int, count: int = 1) -> np.ndarray:
        """float32 numbers."""
        return self._load(offset, count, "<f4").astype(np.float32, copy=False)

    def f64(self, offset: int, count: int = 1) -> np.ndarray:
        """float64 numbers, as float32."""
        return self._load(offset, count, "<f8").astype(np.float32)

    def float(self, vector: np.ndarray) -> np.ndarray:
        """The same numbers as float32."""
        return vector.astype(np.float32)

    def half(self, vector: np.ndarray) -> np.ndarray:
        """16 bits each, read as IEEE halves, as float32."""
        return vector.view(np.float16).astype(np.float32)

    def narrow(self, vector: np.ndarray) -> np.ndarray:
        """Numbers below 256 as unsigned bytes."""
        return vector.astype(np.uint8)

    def part(self, vector: np.ndarray, start: int, count: int) -> np.ndarray:
        """The elements from `start` on."""
        return vector[:, start : start + count]

    def wide(self, vector: np.ndarray) -> np.ndarray:
        """Unsigned bytes as numbers of 16 bits."""
        return vector.astype(np.uint16)

    def signed(self, vector: np.ndarray) -> np.ndarray:
        """Unsigned bytes read as signed ones."""
        return vector.view(np.int8)

    def masks(self, vector: np.ndarray) -> np.ndarray:
        """One byte for each bit of unsigned bytes, from the lowest up: 255 where it is set, else 0."""
        return np.unpackbits(vector, axis=1, bitorder="little") * np.uint8(255)

    def look_up(self, table: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """The entries of a table (n,) or (n, length), uint8 or float32, one after the other."""
        return table[indices].reshape(len(indices), -1)

    def concat(self, *vectors: np.ndarray) -> np.ndarray:
        """One after the other."""
        return np.concatenate(vectors, axis=1)

    def interleave(self, *vectors: np.ndarray) -> np.ndarray:
        """The first of each, then the second of each, and so on."""
        return np.stack(vectors, axis=-1).reshape(len(self._data), -1)


def dequantize_rows(rows: np.ndarray, format: WeightFormat) -> np.ndarray:
    """Packed rows (R, row_bytes) uint8 -> float32 (R, columns), for every known format.

    Bit for bit ggml's values. Raises ValueError when the bytes are not whole blocks.
    """
    blocks, rest = divmod(rows.shape[1], format.block_bytes)
    if rest:
        raise ValueError(f"a row of {rows.shape[1]} bytes is not a whole number of {format.name} blocks")
    if format in _PLAIN:
        return np.ascontiguousarray(rows).view(_PLAIN[format]).astype(np.float32)
    values = np.empty((len(rows), blocks * format.block_size), np.float32)
    step = max(1, _TILE_BYTES // max(1, rows.shape[1]))
    with np.errstate(all="ignore"):  # any bytes are a legal block; infinite scales are computed through
        for first in range(0, len(rows), step):
            values[first : first + step] = _decode_rows(np.ascontiguousarray(rows[first : first + step]), format)
    return values


def _decode_rows(rows: np.ndarray, format: WeightFormat) -> np.ndarray:
    weights, size = chunk(format)
    blocks = rows.shape[1] // size
    values = _decode_blocks(rows[:, : blocks * size].reshape(-1, size), format).reshape(len(rows), -1)
    if blocks * size == rows.shape[1]:
        return values
    # Only formats without blocks have a rest: decode it from a zero-padded chunk.
    rest = rows[:, blocks * size :]
    padded = np.zeros((len(rows), size), np.uint8)
    padded[:, : rest.shape[1]] = rest
    return np.hstack([values, _decode_blocks(padded, format)[:, : rest.shape[1] * weights // size]])


def _decode_blocks(blocks: np.ndarray, format: WeightFormat) -> np.ndarray:
    quants, scales, minimums, zero = DECODERS[format](NumpyBlock(blocks))
    values = np.concatenate(quants, axis=1)
    if zero:
        values = (values - zero).view(np.int8)
    values = values.astype(np.float32, copy=False)
    if scales is None:
        return values
    spread = values.reshape(len(blocks), scales.shape[1], -1) * scales[:, :, None]
    if minimums is not None:
        spread -= minimums[:, :, None]
    return spread.reshape(values.shape)
