"""Uploads through two buffers, with copies that end as late as they may in place of a GPU's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trichord.upload import Upload, upload


class LateCopies:
    """Copies nothing until it is waited for: a buffer filled again too early shows in what arrives."""

    def __init__(self) -> None:
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.most_pending = 0
        self.buffers: set[int] = set()

    def __call__(self, target, source):
        copy = (target, source)
        self.pending.append(copy)
        self.most_pending = max(self.most_pending, len(self.pending))
        self.buffers.add(source.data_ptr())
        return lambda: self.finish(copy)

    def finish(self, last) -> None:
        """Ends the copies up to this one: a device works through them in order."""
        while any(copy is last for copy in self.pending):
            target, source = self.pending.pop(0)
            target.copy_(source)

    def finish_all(self) -> None:
        if self.pending:
            self.finish(self.pending[-1])


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 16), (7, 31), (64, 9)])
@pytest.mark.parametrize("buffer_bytes", [16, 64, 1000])
def test_what_arrives_is_what_was_sent(shape, buffer_bytes):
    rng = np.random.default_rng(shape[0])
    arrays = [rng.integers(0, 256, shape, np.uint8) for _ in range(3)]
    copies = LateCopies()
    uploading = Upload(torch.device("cpu"), buffer_bytes, copies)
    tensors = [uploading(array) for array in arrays]
    copies.finish_all()
    for array, tensor in zip(arrays, tensors, strict=True):
        assert tensor.shape == shape
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_one_buffer_is_filled_while_the_other_is_copied():
    copies = LateCopies()
    Upload(torch.device("cpu"), 8, copies)(np.arange(100, dtype=np.uint8).reshape(4, 25))
    assert copies.most_pending == 2
    assert len(copies.buffers) == 2


def test_a_whole_array_may_be_cut_from_another():
    rows = np.arange(60, dtype=np.uint8).reshape(6, 10)[2:5]
    copies = LateCopies()
    tensor = Upload(torch.device("cpu"), 7, copies)(rows)
    copies.finish_all()
    np.testing.assert_array_equal(tensor.numpy(), rows)


def test_on_the_cpu_nothing_is_copied():
    blocks = np.zeros((2, 3), np.uint8)
    assert upload(blocks, torch.device("cpu")).data_ptr() == blocks.ctypes.data


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_arrives_on_a_gpu_is_what_was_sent():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (rows, 1000), np.uint8) for rows in (1, 3000, 70)]
    uploading = Upload(torch.device("cuda", torch.cuda.current_device()), 1 << 16)
    for array, tensor in zip(arrays, [uploading(array) for array in arrays], strict=True):
        np.testing.assert_array_equal(tensor.cpu().numpy(), array)
