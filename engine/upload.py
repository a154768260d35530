"""Uploads: from the file's map to a GPU through two pinned buffers, one being filled while the other is copied."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch

BUFFER_BYTES = 32 << 20

StartCopy: TypeAlias = Callable[[torch.Tensor, torch.Tensor], Callable[[], None]]
"""Begins to copy the second tensor to the first, and returns what waits for the end of that."""


class Upload:
    """Copies arrays to one device, piece by piece. May be called again at once: the device keeps the order.

    Reading the map is what waits for the disk; it goes on while the other buffer's piece is on its way.
    """

    def __init__(
        self,
        device: torch.device,
        buffer_bytes: int = BUFFER_BYTES,
        start_copy: StartCopy | None = None,
    ) -> None:
        """Raises RuntimeError where the machine has no more memory to pin."""
        self._device = device
        self._start_copy = start_copy or _start_copy
        pinned = device.type == "cuda"
        self._buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._waits: list[Callable[[], None]] = [lambda: None] * 2
        self._turn = 0

    def __call__(self, blocks: np.ndarray) -> torch.Tensor:
        """blocks, uint8 -> a tensor of the same shape on the device, whole for all that runs there later."""
        source = torch.from_numpy(np.ascontiguousarray(blocks)).view(-1)
        target = torch.empty(blocks.shape, dtype=torch.uint8, device=self._device)
        flat = target.view(-1)
        for piece, place in zip(source.split(len(self._buffers[0])), flat.split(len(self._buffers[0])), strict=True):
            turn = self._turn
            self._turn = 1 - turn
            self._waits[turn]()  # the piece before the last may still be read from this buffer
            staged = self._buffers[turn][: len(piece)].copy_(piece)
            self._waits[turn] = self._start_copy(place, staged)
        return target


def upload(blocks: np.ndarray, device: torch.device) -> torch.Tensor:
    """blocks, uint8, as a tensor on `device`: on the CPU the array itself."""
    if device.type != "cuda":
        return torch.from_numpy(blocks).to(device)
    uploading = _uploads(device)
    return torch.from_numpy(blocks).to(device) if uploading is None else uploading(blocks)


def finish_uploads() -> None:
    """Gives back the buffers, and the memory that packing took, when a model is loaded."""
    _uploads.cache_clear()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@functools.cache
def _uploads(device: torch.device) -> Upload | None:
    try:
        return Upload(device)
    except RuntimeError as error:
        warnings.warn(f"Loading without pinned memory, hence more slowly: {error}", stacklevel=4)
        return None


def _start_copy(target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
    target.copy_(source, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(target.device))
    return copied.synchronize
