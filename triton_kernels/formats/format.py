"""What a weight format is to the kernels: its planes, how GGUF blocks become planes and back, and its decode function.

GGUF stores a row as an array of structs (Q6_K: 210 bytes, not even 4-byte aligned). Packing splits it once, at load,
into *planes*: one array for the quants, one for the scales, and so on, each row-major over all rows and starting at a
multiple of 16 bytes, concatenated into one tensor of bytes. A kernel then reads 16 bytes a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import triton

from trichord.weight_format import WeightFormat

_ALIGNMENT = 16
_CHUNK_BYTES = 64 << 20  # blocks repacked at a time: bounds the memory that packing takes beside the weight itself


@dataclass(frozen=True)
class Plane:
    """`size` bytes for every run of `weights` weights of a row, which kernels read as elements of `dtype`."""

    dtype: torch.dtype
    size: int
    weights: int


@dataclass(frozen=True, eq=False)
class Format:
    """One weight format on the GPU. A kernel takes the whole object as a constexpr argument.

    `split` turns blocks (rows, blocks, block_bytes) uint8 into one uint8 tensor a plane, (rows, ..., bytes) whose last
    dimensions flatten to the plane's bytes of a row; `join` is its inverse and gets them as (rows, blocks, bytes).

    `decode(planes, row, group, columns)` is a @triton.jit function. It reads, for rows `row` (R,) int64 and groups
    `group` (G,) int32 of `group_size` weights, from `planes`, a tuple of pointers with the codebook last if there is
    one, of a power of two of bytes and at a multiple of it; `columns` is the length of a row. A float format returns
    its weights (R, G, group_size) in float32. An integer format has groups of 32 and returns

    * two int32 tensors (R, G, 4): weights 0..15 and 16..31 of each group, four signed bytes a word, lowest first;
    * scale and minimum, float32 (R, G, 32 / scale_group): weight = scale * (byte - zero) - minimum, where a format
      without `has_minimum` returns anything for the minimum.
    """

    weight_format: WeightFormat
    planes: tuple[Plane, ...]
    split: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    join: Callable[..., torch.Tensor]
    decode: triton.runtime.KernelInterface
    integer: bool = True
    group_size: int = 32
    scale_group: int = 32
    zero: int = 0
    has_minimum: bool = False
    codebook: Callable[[], np.ndarray] | None = None

    def __repr__(self) -> str:
        return f"Format({self.weight_format.name})"

    @property
    def cache_key(self) -> str:
        """What Triton's cache of compiled kernels knows a constexpr by: all that a kernel reads of it."""
        facts = (self.integer, self.group_size, self.scale_group, self.zero, self.has_minimum)
        return f"{self.weight_format.name}{facts}{self.decode.cache_key}"

    @property
    def wide(self) -> bool:
        """Whether the weights have more bits than a float16 operand keeps."""
        return not self.integer and self.planes[0].dtype.itemsize > 2

    @property
    def code_bits(self) -> int:
        """Bits of a code in the planes, those of words: in a format without a codebook, of the byte that it becomes."""
        return sum(8 * plane.size // plane.weights for plane in self.planes if plane.dtype == torch.int32)

    def groups(self, columns: int) -> int:
        """Groups in a row; the last one of a float format may be padded."""
        return -(-columns // self.group_size)

    def views(self, data: torch.Tensor, rows: int, columns: int) -> list[torch.Tensor]:
        """The planes inside packed `data`, (rows, row_bytes) uint8 each, sharing its memory."""
        return [data[start:end].view(rows, -1) for start, end in self._spans(rows, columns)]

    def arguments(self, data: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, ...]:
        """What kernels take as `planes`: each plane in its own dtype, and the codebook."""
        spans = self._spans(rows, columns)
        planes = [data[start:end].view(plane.dtype) for (start, end), plane in zip(spans, self.planes, strict=True)]
        if self.codebook is not None:
            planes.append(_codebook(self.codebook, data.device))
        return tuple(planes)

    def pack(self, blocks: torch.Tensor, columns: int) -> torch.Tensor:
        """GGUF blocks (rows, row_bytes) uint8 -> planes, one-dimensional uint8, on the same device."""
        rows, row_bytes = blocks.shape
        if row_bytes != self.weight_format.row_bytes(columns):
            raise ValueError(f"{row_bytes} bytes are not a row of {columns} weights in {self.weight_format.name}")
        data = torch.zeros(self._spans(rows, columns)[-1][1], dtype=torch.uint8, device=blocks.device)
        views = self.views(data, rows, columns)
        for part in _row_chunks(rows, row_bytes):
            structs = blocks[part].unflatten(1, (-1, self.weight_format.block_bytes))
            for view, plane in zip(views, self.split(structs), strict=True):
                plane = plane.flatten(1)
                view[part, : plane.shape[1]] = plane
        return data

    def unpack(self, data: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """The inverse of `pack`: (rows, row_bytes) uint8."""
        row_bytes = self.weight_format.row_bytes(columns)
        blocks = torch.empty((rows, row_bytes), dtype=torch.uint8, device=data.device)
        views = self.views(data, rows, columns)
        for part in _row_chunks(rows, row_bytes):
            planes = [
                view[part, : columns * plane.size // plane.weights].unflatten(1, (columns // self._block, -1))
                for view, plane in zip(views, self.planes, strict=True)
            ]
            blocks[part] = self.join(*planes).flatten(1)
        return blocks

    @property
    def _block(self) -> int:
        return self.weight_format.block_size

    def _spans(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Where each plane starts and ends in the packed bytes. Rows are padded to whole groups."""
        padded = self.groups(columns) * self.group_size
        spans, start = [], 0
        for plane in self.planes:
            end = start + rows * (padded * plane.size // plane.weights)
            spans.append((start, end))
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
        return spans


def _row_chunks(rows: int, row_bytes: int) -> list[slice]:
    step = max(1, _CHUNK_BYTES // max(1, row_bytes))
    return [slice(start, start + step) for start in range(0, rows, step)]


@cache
def _codebook(table: Callable[[], np.ndarray], device: torch.device) -> torch.Tensor:
    """The table at a multiple of its length, which is a power of two: see `grid.gather`."""
    words = torch.from_numpy(table())
    space = torch.empty(2 * words.nbytes, dtype=torch.uint8, device=device)
    start = -space.data_ptr() % words.nbytes
    return space[start : start + words.nbytes].view(words.dtype).copy_(words)
