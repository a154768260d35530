"""Causal attention over the paged cache: one flash-attention kernel for prompt chunks and for single tokens.

A program holds a tile of queries and walks the keys in steps, keeping a running maximum and sum of the softmax (online
softmax: Milakov and Gimelshein, 2018; Dao et al., 2022). The query heads that share a key-value head lie in the same
tile, as rows (token, head), so that its keys and values are read once for all of them. A single token gives too few
programs to fill a GPU: its context is split among several (flash decoding: Dao et al., 2023), and a second kernel
combines their results.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.primitives import half_dot

MAX_SPLITS = 64


@triton.jit
def _dot(a, b, accumulator, EXACT: tl.constexpr):
    """accumulator + a @ b, of float32 operands when EXACT, else of float16."""
    if EXACT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return half_dot(a.to(tl.float16), b.to(tl.float16), accumulator)


@triton.jit
def _load_rows(pointer, rows, columns, inside, SIZE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows of SIZE elements as a tile (rows, BLOCK); zeros beyond SIZE, and where not `inside` when MASKED."""
    addresses = pointer + rows[:, None] * SIZE + columns[None, :]
    if MASKED and SIZE < BLOCK:
        return tl.load(addresses, mask=inside[:, None] & (columns[None, :] < SIZE), other=0.0)
    elif MASKED:
        return tl.load(addresses, mask=inside[:, None], other=0.0)
    elif SIZE < BLOCK:
        return tl.load(addresses, mask=columns[None, :] < SIZE, other=0.0)
    else:
        return tl.load(addresses)


@triton.jit
def _step(
    start,
    queries,
    factors,
    query_positions,
    largest,
    total,
    mean,
    keys,
    values,
    page_table,
    page_rows,
    length,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    EXACT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Attends to BLOCK_KEYS positions of one page, from `start`; returns the new (largest, total, mean)."""
    offsets = tl.arange(0, BLOCK_KEYS)
    positions = start + offsets
    page = tl.load(page_table + start // PAGE).to(tl.int64)
    rows = page * page_rows + start % PAGE + offsets
    inside = positions < length
    key = _load_rows(keys, rows, tl.arange(0, BLOCK_HEAD), inside, HEAD_SIZE, BLOCK_HEAD, MASKED)
    scores = tl.zeros([queries.shape[0], BLOCK_KEYS], tl.float32)
    scores = _dot(queries, tl.trans(key), scores, EXACT)
    if MASKED:
        scores = tl.where(positions[None, :] <= query_positions[:, None], scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, axis=1) * factors)
    weights = tl.exp2(scores * factors[:, None] - new_largest[:, None])
    decay = tl.exp2(largest - new_largest)
    value = _load_rows(values, rows, tl.arange(0, BLOCK_VALUE), inside, VALUE_SIZE, BLOCK_VALUE, MASKED)
    mean = _dot(weights, value, mean * decay[:, None], EXACT)
    return new_largest, total * decay + tl.sum(weights, axis=1), mean


@triton.jit
def _split_span(length, splits, BLOCK_KEYS: tl.constexpr):
    """Positions of one split: whole steps, so that no two splits meet inside one."""
    return tl.cdiv(tl.cdiv(length, BLOCK_KEYS), splits) * BLOCK_KEYS


@triton.jit(do_not_specialize=["max_pages", "splits"])  # they change as sequences grow: no new compilation for that
def attention_kernel(
    q,
    key_cache,
    value_cache,
    page_tables,
    query_starts,
    context_lengths,
    output,
    log_sums,
    kv_heads,
    max_pages,
    splits,
    token_stride,
    head_stride,
    scale,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    EXACT: tl.constexpr,
    SINGLE: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """One program a (tile of rows, split of the context), key-value head and sequence.

    Rows are the pairs (token, query head of the group). SINGLE: the sequences of one token, else those of several.
    PARTIAL: the splits' results go to output (S, H, splits, Dv) and the logarithms (base 2) of their softmax sums to
    log_sums (S, H, splits); else there is one split and output is (T, H, Dv).
    """
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2)
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // splits  # later tokens see more keys: the longest work first
    split = tl.program_id(0) % splits
    first_token = tl.load(query_starts + sequence)
    tokens = tl.load(query_starts + sequence + 1) - first_token
    length = tl.load(context_lengths + sequence)
    visible = tl.minimum(length, length - tokens + ((tile + 1) * BLOCK_ROWS - 1) // GROUP + 1)
    span = _split_span(visible, splits, BLOCK_KEYS)
    begin = split * span
    end = tl.minimum(visible, begin + span)
    if ((tokens == 1) != SINGLE) | (tile * BLOCK_ROWS >= tokens * GROUP) | (begin >= end):
        return

    tile_rows = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    query_tokens = tile_rows // GROUP
    query_heads = kv_head * GROUP + tile_rows % GROUP
    query_positions = length - tokens + query_tokens
    used = query_positions < length
    columns = tl.arange(0, BLOCK_HEAD)
    query_rows = (first_token + query_tokens).to(tl.int64) * token_stride + query_heads * head_stride
    queries = tl.load(
        q + query_rows[:, None] + columns[None, :], mask=used[:, None] & (columns < HEAD_SIZE)[None, :], other=0.0
    )
    # A power of two a row takes the queries into half precision's range; the scores are multiplied by it afterwards.
    exponents = tl.max(tl.abs(queries), axis=1).to(tl.int32, bitcast=True) & 0x7F800000
    powers = tl.maximum(exponents.to(tl.float32, bitcast=True), 1e-30)
    queries /= powers[:, None]
    if not EXACT:
        queries = queries.to(tl.float16)
    factors = powers * (scale * 1.4426950408889634)  # exp(x) = exp2(x log2(e))

    whole = begin  # SINGLE waits for memory, not for the mask: one loop
    if not SINGLE:
        whole = (length - tokens + tile * BLOCK_ROWS // GROUP + 1) // BLOCK_KEYS * BLOCK_KEYS
    keys = key_cache + kv_head * (PAGE * HEAD_SIZE)
    values = value_cache + kv_head * (PAGE * VALUE_SIZE)
    page_rows = kv_heads * PAGE
    page_table = page_tables + sequence.to(tl.int64) * max_pages
    largest = tl.full([BLOCK_ROWS], -1e30, tl.float32)  # finite: a row that sees no key in a step must not give NaN
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    mean = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
    for start in range(begin, whole, BLOCK_KEYS):  # positions that every row of the tile sees
        largest, total, mean = _step(
            start, queries, factors, query_positions, largest, total, mean, keys, values, page_table, page_rows, length,
            HEAD_SIZE, VALUE_SIZE, BLOCK_HEAD, BLOCK_VALUE, PAGE, BLOCK_KEYS, EXACT, MASKED=False,
        )  # fmt: skip
    for start in range(whole, end, BLOCK_KEYS):
        largest, total, mean = _step(
            start, queries, factors, query_positions, largest, total, mean, keys, values, page_table, page_rows, length,
            HEAD_SIZE, VALUE_SIZE, BLOCK_HEAD, BLOCK_VALUE, PAGE, BLOCK_KEYS, EXACT, MASKED=True,
        )  # fmt: skip

    if PARTIAL:
        output_rows = (sequence.to(tl.int64) * kv_heads * GROUP + query_heads) * splits + split
        tl.store(log_sums + output_rows, largest + tl.log2(total), mask=used)
    else:
        output_rows = (first_token + query_tokens).to(tl.int64) * kv_heads * GROUP + query_heads
    columns = tl.arange(0, BLOCK_VALUE)
    tl.store(
        output + output_rows[:, None] * VALUE_SIZE + columns[None, :],
        mean / total[:, None],
        mask=used[:, None] & (columns < VALUE_SIZE)[None, :],
    )


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    partial,
    log_sums,
    query_starts,
    context_lengths,
    output,
    heads,
    splits,
    VALUE_SIZE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """One program a query head and sequence of one token: the means of its splits, weighted by their softmax sums."""
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    token = tl.load(query_starts + sequence)
    if tl.load(query_starts + sequence + 1) - token != 1:
        return
    length = tl.load(context_lengths + sequence)
    split = tl.arange(0, BLOCK_SPLITS)
    used = (split < splits) & (split * _split_span(length, splits, BLOCK_KEYS) < length)
    rows = (sequence.to(tl.int64) * heads + head) * splits + split
    logarithms = tl.load(log_sums + rows, mask=used, other=float("-inf"))
    weights = tl.exp2(logarithms - tl.max(logarithms, axis=0))
    columns = tl.arange(0, BLOCK_VALUE)
    means = tl.load(
        partial + rows[:, None] * VALUE_SIZE + columns[None, :],
        mask=used[:, None] & (columns < VALUE_SIZE)[None, :],
        other=0.0,
    )
    mean = tl.sum(means * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    row = token.to(tl.int64) * heads + head
    tl.store(output + row * VALUE_SIZE + columns, mean, mask=columns < VALUE_SIZE)


@functools.cache
def _wanted_programs(device: torch.device) -> int:
    """Programs that keep the device busy: two a multiprocessor, so that one computes while the other waits."""
    if device.type == "cpu":  # Triton's interpreter: enough to split a context
        return 4
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _tile(block_head: int, key_bytes: int, group: int, single: bool, precision: str) -> dict[str, int]:
    """Rows, keys, warps and pipeline stages of one program, such that registers and shared memory suffice.

    Without tensor cores (float32 operands) every thread holds whole rows of its operands: a small tile of many threads.
    """
    fewest_rows = max(16, min(triton.next_power_of_2(group), 64))
    keys = max(16, min(64, 16384 // key_bytes))  # a tile of 16 KiB
    if triton.knobs.runtime.interpret:  # it runs one program after another at a high price each
        rows, keys, warps, stages = fewest_rows if single else 128, 32, 1, 1
    elif precision == "exact":
        rows, keys, warps, stages = 16, 16, 8, 2
    elif single:
        rows, warps, stages = fewest_rows, 4, 3
    else:
        rows, warps, stages = 64 if block_head > 128 else 128, 8, 2
    return {"BLOCK_ROWS": rows, "BLOCK_KEYS": keys, "num_warps": warps, "num_stages": stages}


def attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lengths: torch.Tensor,
    max_query: int,
    scale: float,
    precision: str,
) -> torch.Tensor:
    """Causal attention of q (T, H, D) float32 over the paged cache -> (T, H, Dv) float32, contiguous.

    key_cache (P, G, page, D) and value_cache (P, G, page, Dv), contiguous, float32 or float16; page a power of two of
    at least 16. Sequence s owns the rows query_starts[s]:query_starts[s+1] of q (query_starts (S+1,) int32), the last
    of its context_lengths[s] (S,) int32 positions; position p lies in page page_tables[s, p // page] (page_tables
    (S, max_pages) int32). max_query is the longest query. Query head h reads key head h // (H / G). The elements of
    a head of q must be adjacent. Precision "exact" multiplies in float32, the others in float16; all add in float32.
    """
    tokens, heads, head_size = q.shape
    _, kv_heads, page, value_size = value_cache.shape
    if page < 16 or page & (page - 1):
        raise ValueError(f"a page must hold a power of two of at least 16 positions, not {page}")
    sequences, max_pages = page_tables.shape
    group = heads // kv_heads
    block_head, block_value = (max(16, triton.next_power_of_2(size)) for size in (head_size, value_size))
    output = torch.empty((tokens, heads, value_size), dtype=torch.float32, device=q.device)

    def launch(single: bool) -> None:
        widest = max(block_head, block_value)
        tile = _tile(widest, widest * key_cache.itemsize, group, single, precision)
        tile["BLOCK_KEYS"] = min(tile["BLOCK_KEYS"], page)
        tiles = triton.cdiv(group * (1 if single else max_query), tile["BLOCK_ROWS"])
        splits = 1
        if single:
            steps = max_pages * page // tile["BLOCK_KEYS"]
            wanted = triton.cdiv(_wanted_programs(q.device), tiles * kv_heads * sequences)
            splits = min(wanted, steps, MAX_SPLITS)
        partial, log_sums = output, output
        if splits > 1:
            partial = torch.empty((sequences, heads, splits, value_size), dtype=torch.float32, device=q.device)
            log_sums = torch.empty((sequences, heads, splits), dtype=torch.float32, device=q.device)
        attention_kernel[(tiles * splits, kv_heads, sequences)](
            q,
            key_cache,
            value_cache,
            page_tables,
            query_starts,
            context_lengths,
            partial,
            log_sums,
            kv_heads,
            max_pages,
            splits,
            *q.stride()[:2],
            scale,
            GROUP=group,
            HEAD_SIZE=head_size,
            VALUE_SIZE=value_size,
            BLOCK_HEAD=block_head,
            BLOCK_VALUE=block_value,
            PAGE=page,
            EXACT=precision == "exact",
            SINGLE=single,
            PARTIAL=splits > 1,
            enable_fp_fusion=True,
            **tile,
        )
        if splits > 1:
            combine_kernel[(heads, sequences)](
                partial,
                log_sums,
                query_starts,
                context_lengths,
                output,
                heads,
                splits,
                VALUE_SIZE=value_size,
                BLOCK_VALUE=block_value,
                BLOCK_KEYS=tile["BLOCK_KEYS"],
                BLOCK_SPLITS=MAX_SPLITS,
                enable_fp_fusion=True,
            )

    if max_query > 1:
        launch(single=False)
    if max_query == 1 or sequences > 1:
        launch(single=True)
    return output
