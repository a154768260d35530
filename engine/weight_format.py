"""Weight formats: the geometry of every GGML type, and the record of one loaded weight.

A format stores a row as a run of blocks. Geometry is all that is known here; each backend holds the decoding. The
table follows ggml's `type_traits` (ids are stable, they are written into files). This module imports nothing of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Layout = Literal["blocks", "planes"]


class WeightFormat(Enum):
    """One GGML type: `ggml_id` in the file, `block_size` weights in `block_bytes` bytes.

    >>> WeightFormat.Q4_K.bits_per_weight
    4.5
    """

    F32 = (0, 1, 4)
    F16 = (1, 1, 2)
    Q4_0 = (2, 32, 18)
    Q4_1 = (3, 32, 20)
    Q5_0 = (6, 32, 22)
    Q5_1 = (7, 32, 24)
    Q8_0 = (8, 32, 34)
    Q8_1 = (9, 32, 36)
    Q2_K = (10, 256, 84)
    Q3_K = (11, 256, 110)
    Q4_K = (12, 256, 144)
    Q5_K = (13, 256, 176)
    Q6_K = (14, 256, 210)
    Q8_K = (15, 256, 292)
    IQ2_XXS = (16, 256, 66)
    IQ2_XS = (17, 256, 74)
    IQ3_XXS = (18, 256, 98)
    IQ1_S = (19, 256, 50)
    IQ4_NL = (20, 32, 18)
    IQ3_S = (21, 256, 110)
    IQ2_S = (22, 256, 82)
    IQ4_XS = (23, 256, 136)
    I8 = (24, 1, 1)
    I16 = (25, 1, 2)
    I32 = (26, 1, 4)
    I64 = (27, 1, 8)
    F64 = (28, 1, 8)
    IQ1_M = (29, 256, 56)
    BF16 = (30, 1, 2)
    TQ1_0 = (34, 256, 54)
    TQ2_0 = (35, 256, 66)
    MXFP4 = (39, 32, 17)
    NVFP4 = (40, 64, 36)
    Q1_0 = (41, 128, 18)
    Q2_0 = (42, 64, 18)

    def __init__(self, ggml_id: int, block_size: int, block_bytes: int) -> None:
        self.ggml_id = ggml_id
        self.block_size = block_size
        self.block_bytes = block_bytes

    @classmethod
    def from_ggml_id(cls, ggml_id: int) -> WeightFormat:
        """The format with this id. Raises KeyError for an id that no known GGML version writes."""
        return _BY_ID[ggml_id]

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight takes in the file, scales included."""
        return 8 * self.block_bytes / self.block_size

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of `columns` weights. Raises ValueError unless the blocks fill the row exactly."""
        blocks, rest = divmod(columns, self.block_size)
        if rest:
            raise ValueError(
                f"a row of {columns} weights is not a multiple of {self.name}'s block of {self.block_size}"
            )
        return blocks * self.block_bytes

    def __repr__(self) -> str:
        return f"WeightFormat.{self.name}"


_BY_ID = {weight_format.ggml_id: weight_format for weight_format in WeightFormat}


@dataclass(frozen=True)
class Weight:
    """A matrix (or one matrix an expert) as a backend holds it: packed, never expanded.

    `data` is a uint8 tensor. In layout "blocks" (CPU) it is `(rows, row_bytes)`, the GGUF blocks as they lie in the
    file; in layout "planes" (GPU) it is one-dimensional, the same bits split into aligned planes. `shape` is
    `(out_features, in_features)` or `(experts, out_features, in_features)`. The product is multiplied by `scale`, which
    may be a float32 tensor (experts,), a number for each.
    """

    data: torch.Tensor
    format: WeightFormat
    shape: tuple[int, ...]
    layout: Layout
    scale: float | torch.Tensor = 1.0

    @property
    def out_features(self) -> int:
        """Rows of the matrix (of one expert's matrix)."""
        return self.shape[-2]

    @property
    def in_features(self) -> int:
        """Columns of the matrix: the length of the vectors it multiplies."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Rows in all, over every expert."""
        return prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes resident for this weight."""
        return self.data.numel() * self.data.element_size()

    @property
    def device(self) -> torch.device:
        """Where the packed bytes lie."""
        return self.data.device
