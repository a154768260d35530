"""What the splits of a context leave behind, and how their results become one."""

from __future__ import annotations

import triton
import triton.language as tl

from trichord.triton_kernels.activations import store_limbs
from trichord.triton_kernels.attention_step import first_seen
from trichord.triton_kernels.dependent import await_predecessor


@triton.jit
def split_span(first, last, splits, BLOCK_KEYS: tl.constexpr):
    """Positions of one split of first:last: whole steps, so that no two splits meet inside one."""
    return tl.cdiv(tl.cdiv(last - first, BLOCK_KEYS), splits) * BLOCK_KEYS


@triton.jit
def combined(
    partial,
    log_sums,
    rows,
    used,
    splits,
    count,
    VALUE_SIZE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """The means (R, BLOCK_VALUE) of rows (R,) over their first `count` splits, weighted by the softmax sums."""
    columns = tl.arange(0, BLOCK_VALUE)[None, None, :]
    largest = tl.full(rows.shape, -1e30, tl.float32)
    total = tl.zeros(rows.shape, tl.float32)
    mean = tl.zeros([rows.shape[0], BLOCK_VALUE], tl.float32)
    for first in range(0, count, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)[:, None]
        places = rows[None, :] * splits + split
        inside = used[None, :] & (split < count)
        logarithms = tl.load(log_sums + places, mask=inside, other=float("-inf"))
        mask = inside[:, :, None] & (columns < VALUE_SIZE)
        means = tl.load(partial + places[:, :, None] * VALUE_SIZE + columns, mask=mask, other=0.0)
        new_largest = tl.maximum(largest, tl.max(logarithms, axis=0))
        weights = tl.exp2(logarithms - new_largest[None, :])
        decay = tl.exp2(largest - new_largest)
        total = total * decay + tl.sum(weights, axis=0)
        mean = mean * decay[:, None] + tl.sum(means * weights[:, :, None], axis=0)
        largest = new_largest
    return mean / total[:, None]


@triton.jit
def store_rows(means, rows, used, output, limbs, LIMBS: tl.constexpr, VALUE_SIZE: tl.constexpr):
    """means (R, BLOCK_VALUE) to rows (R,) of the output (T * H, Dv), as floats and, with LIMBS, as integers."""
    columns = tl.arange(0, means.shape[1])[None, :]
    tl.store(output + rows[:, None] * VALUE_SIZE + columns, means, mask=used[:, None] & (columns < VALUE_SIZE))
    if LIMBS:
        GROUPS: tl.constexpr = VALUE_SIZE // 32
        COUNT: tl.constexpr = means.shape[0] * means.shape[1] // 32
        group = tl.arange(0, means.shape[1] // 32)[None, :]
        valid = tl.reshape(used[:, None] & (group < GROUPS), (COUNT, 1))
        place = tl.reshape(rows[:, None] * GROUPS + group, (COUNT, 1))
        store_limbs(tl.reshape(means, (COUNT, 32)), place, valid, limbs, LIMBS)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    partial,
    log_sums,
    query_starts,
    context_lengths,
    output,
    limbs,
    heads,
    splits,
    LIMBS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a query head and sequence of one token: the means of its splits, weighted by their softmax sums."""
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    await_predecessor(PDL)
    token = tl.load(query_starts + sequence)
    if tl.load(query_starts + sequence + 1) - token != 1:
        return
    length = tl.load(context_lengths + sequence)
    begin = first_seen(length - 1, WINDOW, CHUNKED) // BLOCK_KEYS * BLOCK_KEYS
    used_splits = tl.cdiv(length - begin, split_span(begin, length, splits, BLOCK_KEYS))
    row = head + tl.arange(0, 1)
    means = combined(
        partial, log_sums, sequence.to(tl.int64) * heads + row, row < heads, splits, used_splits,
        VALUE_SIZE, BLOCK_VALUE, BLOCK_SPLITS,
    )  # fmt: skip
    store_rows(means, token.to(tl.int64) * heads + row, row < heads, output, limbs, LIMBS, VALUE_SIZE)
