"""Importance matrices: how strongly each column of a weight is driven, measured on a calibration text.

`llama-imatrix` writes them, formerly as a bare binary file (.dat), now as GGUF. Both are untrusted input.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np

from trichord.errors import GGUFError
from trichord.gguf_file import GGUFFile, TensorInfo
from trichord.gguf_header import quoted
from trichord.weight_format import WeightFormat

_SQUARES, _COUNTS = ".in_sum2", ".counts"


class ImportanceMatrix:
    """The mean square of the activations that met each column, by the name of the weight."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads either form of file. Raises GGUFError when it is missing, damaged or something else."""
        self._path = Path(path)
        self._values: dict[str, np.ndarray] = {}
        try:
            with open(self._path, "rb") as file:
                is_gguf = file.read(4) == b"GGUF"
        except OSError as error:
            raise GGUFError(f"{path}: the importance matrix cannot be read: {error.strerror}") from None
        if is_gguf:
            self._read_gguf()
        else:
            self._read_binary(self._path.read_bytes())
        for name, values in self._values.items():
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise GGUFError(f"{self._path.name}: the entry of {quoted(name)} holds negative or non-finite numbers")

    def of(self, tensor: TensorInfo) -> np.ndarray | None:
        """(matrices, columns) float32 for a weight of one matrix or one an expert, or None where there is no entry.

        Raises GGUFError when the entry is of another size: then the matrix was made for another model.
        """
        values = self._values.get(tensor.name)
        if values is None:
            return None
        matrices = tensor.rows // tensor.shape[-2]
        if values.size != matrices * tensor.shape[-1]:
            raise GGUFError(
                f"{self._path.name}: the entry of {quoted(tensor.name)} has {values.size} numbers; a weight of shape"
                f" {tensor.shape} needs {matrices * tensor.shape[-1]} (was the matrix made for this model?)"
            )
        return values.reshape(matrices, tensor.shape[-1])

    def _read_gguf(self) -> None:
        """Tensors NAME.in_sum2 (matrices, columns) and NAME.counts (matrices, 1), both float32."""
        with GGUFFile(self._path) as file:
            for name, tensor in file.tensors.items():
                if not name.endswith(_SQUARES):
                    continue
                weight = name.removesuffix(_SQUARES)
                counts = file.tensors.get(weight + _COUNTS)
                if counts is None or {tensor.format, counts.format} != {WeightFormat.F32}:
                    self._fail(f"the entry of {quoted(weight)} lacks its counts or is not float32")
                sums = file.blocks(name).view(np.float32)
                seen = file.blocks(counts.name).view(np.float32).ravel()
                if sums.size % seen.size:
                    self._fail(f"the entry of {quoted(weight)} has {seen.size} counts for {sums.size} numbers")
                sums, seen = sums.reshape(seen.size, -1), seen[:, None]
                # An expert that the text never reached counts all its columns alike.
                self._values[weight] = np.divide(sums, seen, out=np.ones_like(sums), where=seen > 0)
        if not self._values:
            self._fail("this GGUF file holds no importance matrix")

    def _read_binary(self, data: bytes) -> None:
        """A number of entries; each a name, a number of calls, and sums of that many mean squares; all 32-bit."""
        position = 0

        def number() -> int:
            nonlocal position
            if position + 4 > len(data):
                self._fail("it ends early, or is no importance matrix")
            position += 4
            return struct.unpack_from("<i", data, position - 4)[0]

        def take(size: int) -> bytes:
            nonlocal position
            if size <= 0 or position + size > len(data):
                self._fail("it ends early, or is no importance matrix")
            position += size
            return data[position - size : position]

        for _ in range(number()):
            name = take(number()).decode("utf-8", "surrogateescape")
            calls = number()
            sums = np.frombuffer(take(4 * number()), "<f4")
            self._values[name] = sums / np.float32(max(calls, 1))
        if not self._values:
            self._fail("this file holds no importance matrix")

    def _fail(self, problem: str) -> None:
        raise GGUFError(f"{self._path.name}: {problem}")
