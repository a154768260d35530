"""The last program to arrive: it finishes what needs the results of several, which then takes no further launch."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

COUNTERS = 1 << 14  # as many as programs of one launch may share in groups


@triton.jit
def arrives_last(counter, expected):
    """Whether this program is the last of `expected` ones to call this: then it sees all that the others have stored.

    The counter, which was zero, is zero again then, for the next launch, and for that of a graph that is replayed.
    """
    tl.debug_barrier()  # one thread counts for all, so all must have stored
    is_last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == expected - 1
    tl.debug_barrier()  # and what that thread may see now, all may
    if is_last:
        tl.store(counter, 0)
    return is_last


def counters(device: torch.device) -> torch.Tensor:
    """COUNTERS zeros int32 for launches on the current stream, which follow one another: none needs its own."""
    stream = 0 if device.type == "cpu" else torch.cuda.current_stream(device).cuda_stream
    return _counters(device, stream)


@functools.cache
def _counters(device: torch.device, stream: int) -> torch.Tensor:
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)
