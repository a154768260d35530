"""Attention over the paged cache: one flash-attention kernel for prompt chunks and for single tokens.

A program holds a tile of queries and walks the keys in steps, keeping a running maximum and sum of the softmax (online
softmax: Milakov and Gimelshein, 2018; Dao et al., 2022). The query heads that share a key-value head lie in the same
tile, as rows (token, head), so that its keys and values are read once for all of them. A single token gives too few
programs to fill a GPU: its context is split among several (flash decoding: Dao et al., 2023), and the last of them to
arrive combines their results, or, where these are many, a second kernel. A window of the context bounds the walk, so
that nothing before it is read. Single tokens need no launch before: their queries are turned on the way in, and the
program that reads the newest position writes its key and value first.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.activations import Activations
from trichord.triton_kernels.arrival import arrives_last, counters
from trichord.triton_kernels.attention_splits import combine_kernel, combined, split_span, store_rows
from trichord.triton_kernels.attention_step import first_seen, load_rows, step
from trichord.triton_kernels.dependent import await_predecessor, dependent_launch
from trichord.triton_kernels.rotary import fresh_arguments, rotary_and_cache, store_fresh, turned

Fresh = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor, bool]
"""New keys and values, cos, sin, slots and `interleaved`, as `rotary_and_cache` describes them."""

MAX_SPLITS = 64
MAX_COMBINED = 2048  # elements of a program's result up to which one program is quick enough to combine all splits
BLOCK_COMBINED = 8192  # elements of the splits' results that are read at once


@triton.jit
def _load_queries(
    rows,
    used,
    fresh,
    token,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """`load_rows` of queries, turned by the angles of `fresh` where there are such."""
    if fresh is None:
        return load_rows(rows, used, FIRST, COUNT, BLOCK)
    else:
        columns = tl.arange(0, BLOCK)
        mask = used[:, None] & (columns < COUNT)[None, :]
        cos, sin = fresh[1] + token * PAIRS, fresh[2] + token * PAIRS
        return turned(rows[:, None], cos, sin, FIRST + columns[None, :], mask, PAIRS, INTERLEAVED)


@triton.jit(do_not_specialize=["max_pages", "splits"])  # they change as sequences grow: no new compilation for that
def attention_kernel(
    q,
    fresh,
    fresh_values,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    page_tables,
    query_starts,
    context_lengths,
    sinks,
    slopes,
    output,
    limbs,
    partial,
    log_sums,
    arrivals,
    kv_heads,
    max_pages,
    splits,
    token_stride,
    head_stride,
    scale,
    soft_cap,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    EXACT: tl.constexpr,
    LATENT: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr,
    CAPPED: tl.constexpr,
    SINGLE: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMBS: tl.constexpr,
    COMBINED_ROWS: tl.constexpr,
    COMBINED_SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a (tile of rows, split of the context), key-value head and sequence.

    Rows are the pairs (token, query head of the group). SINGLE: the sequences of one token, else those of several.
    The result goes to output (T, H, Dv) where there is one split. Else there is `partial` (S, H, splits, Dv) for the
    splits' results, and log_sums (S, H, splits) for the logarithms (base 2) of their softmax sums; what is combined of
    these here are the tile's COMBINED_ROWS rows, COMBINED_SPLITS splits at a time, or, of 0 rows, nothing. `fresh`:
    what is not in the cache yet, see `store_fresh`. Of the pieces of a head, see `step`.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634  # exp(x) = exp2(x log2(e))
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2)
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // splits  # later tokens see more keys: the longest work first
    split = tl.program_id(0) % splits
    await_predecessor(PDL)
    first_token = tl.load(query_starts + sequence)
    tokens = tl.load(query_starts + sequence + 1) - first_token
    length = tl.load(context_lengths + sequence)
    first_position = length - tokens + tile * BLOCK_ROWS // GROUP
    lowest = first_seen(first_position, WINDOW, CHUNKED)
    visible = length
    if CAUSAL:
        visible = tl.minimum(length, length - tokens + ((tile + 1) * BLOCK_ROWS - 1) // GROUP + 1)
    begin = lowest // BLOCK_KEYS * BLOCK_KEYS
    span = split_span(begin, visible, splits, BLOCK_KEYS)
    used_splits = tl.cdiv(visible - begin, span)
    begin += split * span
    end = tl.minimum(visible, begin + span)
    if ((tokens == 1) != SINGLE) | (tile * BLOCK_ROWS >= tokens * GROUP) | (begin >= end):
        return
    if fresh is not None and end == length:  # no other program reads the last position
        store_fresh(
            fresh, fresh_values, first_token.to(tl.int64), kv_head + tl.arange(0, 1)[:, None], kv_heads,
            key_cache, value_cache, key_scales, value_scales, HEAD_SIZE, VALUE_SIZE, PAGE, PAIRS, INTERLEAVED,
        )  # fmt: skip
        tl.debug_barrier()

    tile_rows = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    query_tokens = tile_rows // GROUP
    query_heads = kv_head * GROUP + tile_rows % GROUP
    query_positions = length - tokens + query_tokens
    used = query_positions < length
    query_rows = q + (first_token + query_tokens).to(tl.int64) * token_stride + query_heads * head_stride
    factors = tl.full([BLOCK_ROWS], scale / soft_cap if CAPPED else scale * LOG2_E, tl.float32)
    if EXACT:
        queries = (query_rows, used)
    else:
        # A power of two a row takes the queries into half precision's range; the scores are multiplied by it later.
        width: tl.constexpr = min(HEAD_SIZE, BLOCK_HEAD)
        piece = _load_queries(query_rows, used, fresh, first_token, FIRST, width, BLOCK_HEAD, PAIRS, INTERLEAVED)
        greatest = tl.max(tl.abs(piece), axis=1)
        rest = piece
        if BLOCK_REST > 0:
            before: tl.constexpr = 0 if FIRST > 0 else BLOCK_HEAD
            others: tl.constexpr = HEAD_SIZE - BLOCK_HEAD
            rest = _load_queries(query_rows, used, fresh, first_token, before, others, BLOCK_REST, PAIRS, INTERLEAVED)
            greatest = tl.maximum(greatest, tl.max(tl.abs(rest), axis=1))
        exponents = greatest.to(tl.int32, bitcast=True) & 0x7F800000
        powers = tl.maximum(exponents.to(tl.float32, bitcast=True), 1e-30)
        queries = ((piece / powers[:, None]).to(tl.float16), (rest / powers[:, None]).to(tl.float16))
        factors *= powers

    SLOPED: tl.constexpr = slopes is not None
    row_slopes = factors
    if SLOPED:
        row_slopes = tl.load(slopes + query_heads, mask=used, other=0.0) * LOG2_E
    largest = tl.full([BLOCK_ROWS], -1e30, tl.float32)  # finite: a row that sees no key in a step must not give NaN
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    if sinks is not None and split == 0:  # a sink is a score that was met before the first key
        largest = tl.maximum(largest, tl.load(sinks + query_heads, mask=used, other=0.0) * LOG2_E)
        total += 1.0
    mean = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)

    # Up to `whole`, every row of the tile sees every position. SINGLE waits for memory, not for the mask, and a window
    # has an edge on either side: one loop for them.
    whole = begin
    if not SINGLE and WINDOW == 0:
        whole = (first_position + 1 if CAUSAL else length) // BLOCK_KEYS * BLOCK_KEYS
    keys = key_cache + kv_head * (PAGE * HEAD_SIZE)
    values = value_cache + kv_head * (PAGE * VALUE_STRIDE)
    head_key_scales = key_scales
    head_value_scales = value_scales
    if key_scales is not None:
        head_key_scales = key_scales + kv_head * (PAGE * ((HEAD_SIZE + 31) // 32))
        head_value_scales = value_scales + kv_head * (PAGE * ((VALUE_SIZE + 31) // 32))
    page_rows = kv_heads * PAGE
    page_table = page_tables + sequence.to(tl.int64) * max_pages
    for start in range(begin, whole, BLOCK_KEYS):
        largest, total, mean = step(
            start, queries, factors, query_positions, row_slopes, soft_cap * LOG2_E, largest, total, mean,
            keys, values, head_key_scales, head_value_scales, page_table, page_rows, lowest, length,
            HEAD_SIZE, VALUE_SIZE, VALUE_STRIDE, FIRST, BLOCK_HEAD, BLOCK_REST, BLOCK_VALUE, PAGE, BLOCK_KEYS,
            EXACT, LATENT, CAUSAL, WINDOW, CHUNKED, CAPPED, SLOPED, MASKED=False,
        )  # fmt: skip
    for start in range(whole, end, BLOCK_KEYS):
        largest, total, mean = step(
            start, queries, factors, query_positions, row_slopes, soft_cap * LOG2_E, largest, total, mean,
            keys, values, head_key_scales, head_value_scales, page_table, page_rows, lowest, length,
            HEAD_SIZE, VALUE_SIZE, VALUE_STRIDE, FIRST, BLOCK_HEAD, BLOCK_REST, BLOCK_VALUE, PAGE, BLOCK_KEYS,
            EXACT, LATENT, CAUSAL, WINDOW, CHUNKED, CAPPED, SLOPED, MASKED=True,
        )  # fmt: skip

    if partial is None:
        output_rows = (first_token + query_tokens).to(tl.int64) * kv_heads * GROUP + query_heads
        store_rows(mean / total[:, None], output_rows, used, output, limbs, LIMBS, VALUE_SIZE)
    else:
        sequence_row = sequence.to(tl.int64) * kv_heads * GROUP
        places = (sequence_row + query_heads) * splits + split
        tl.store(log_sums + places, largest + tl.log2(total), mask=used)
        store_rows(mean / total[:, None], places, used, partial, None, 0, VALUE_SIZE)
        if COMBINED_ROWS > 0:
            tiles = tl.num_programs(0) // splits
            counter = arrivals + (sequence * kv_heads + kv_head) * tiles + tile
            if arrives_last(counter, used_splits):
                heads = tile * BLOCK_ROWS + tl.arange(0, COMBINED_ROWS)
                present = heads < GROUP
                heads += kv_head * GROUP
                means = combined(
                    partial, log_sums, sequence_row + heads, present, splits, used_splits,
                    VALUE_SIZE, BLOCK_VALUE, COMBINED_SPLITS,
                )  # fmt: skip
                output_rows = first_token.to(tl.int64) * kv_heads * GROUP + heads
                store_rows(means, output_rows, present, output, limbs, LIMBS, VALUE_SIZE)


@functools.cache
def _wanted_programs(device: torch.device) -> int:
    """Programs that keep the device busy: two a multiprocessor, so that one computes while the other waits."""
    if device.type == "cpu":  # Triton's interpreter: enough to split a context
        return 4
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _tile(widest: int, key_bytes: int, group: int, single: bool, precision: str) -> dict[str, int]:
    """Rows, keys, warps and pipeline stages of one program, such that registers and shared memory suffice.

    `widest` is the larger of a row of keys and one of values, in elements and padded; key_bytes is its size.
    """
    fewest_rows = max(16, min(triton.next_power_of_2(group), 64))
    keys = max(16, min(64, 16384 // key_bytes))  # a tile of 16 KiB
    if triton.knobs.runtime.interpret:  # it runs one program after another at a high price each
        rows, keys, warps, stages = fewest_rows if single else 128, 32, 1, 1
    elif precision == "exact":  # without tensor cores every thread holds whole rows of its operands
        rows, keys, warps, stages = 16, 16, 8, 1
    elif widest > 256:
        rows, warps, stages = min(fewest_rows, 32) if single else 32, 8, 2
    elif single:
        rows, warps, stages = fewest_rows, 4, 3
    else:
        rows, warps, stages = 64 if widest > 128 else 128, 8, 2
    return {"BLOCK_ROWS": rows, "BLOCK_KEYS": keys, "num_warps": warps, "num_stages": stages}


def _padded(size: int) -> int:
    """The smallest extent of a tile that holds `size` elements."""
    return max(16, triton.next_power_of_2(size))


def _pieces(size: int) -> tuple[int, int]:
    """BLOCK_HEAD and BLOCK_REST: the extents of a head's two pieces, if these take less than one (576 = 512 + 64)."""
    whole = _padded(size)
    half = whole // 2
    rest = _padded(size - half) if size > half >= 16 else half
    return (half, rest) if rest < half else (whole, 0)


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
    *,
    causal: bool = True,
    window: int = 0,
    chunked: bool = False,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    fresh: Fresh | None = None,
    prepare: bool = False,
) -> torch.Tensor | Activations:
    """Attention of q (T, H, D) float32 over the paged cache -> (T, H, Dv) float32, contiguous.

    key_cache (P, G, page, D), contiguous, and value_cache (P, G, page, Dv), contiguous or a view of adjacent elements
    of such a cache (a latent's values among its keys), float32 or float16; or both int8 and contiguous, with key_scales
    (P, G, page, ceil(D/32)) and value_scales float16. page: a power of two of at least 16.
    Sequence s owns the rows query_starts[s]:query_starts[s+1] of q (query_starts (S+1,) int32), the last of its
    context_lengths[s] (S,) int32 positions; position p lies in page page_tables[s, p // page] (page_tables
    (S, max_pages) int32). max_query is the longest query. Query head h reads key head h // (H / G). The elements of
    a head of q must be adjacent. Precision "exact" multiplies in float32, the others in float16; all add in float32.

    A query at position p sees positions up to p (all, unless `causal`), of these with a window W only those after
    p - W, or, `chunked`, those from p // W * W on; pages before all of these are not touched. A score s becomes
    soft_cap * tanh(s / soft_cap) where that is not 0 (Gemma 2), then gains slopes[h] * (key position - p) (slopes
    (H,): ALiBi, Press et al., 2022). sinks (H,) are a further score of each head, without a value, in the softmax's
    sum (Xiao et al., 2024). `fresh` keys and values are written and q is turned first, as `rotary_and_cache` does it;
    q may be overwritten. With `prepare`, the result is (T, H * Dv), as `matmul` reads it in this precision. Raises
    ValueError for pages or caches of another shape.
    """
    tokens, heads, head_size = q.shape
    _, kv_heads, page, value_size = value_cache.shape
    if page < 16 or page & (page - 1):
        raise ValueError(f"a page must hold a power of two of at least 16 positions, not {page}")
    value_stride = value_cache.stride(2)
    if value_scales is not None and value_stride != value_size:
        raise ValueError("values of 8 bits must have a cache of their own, not lie among the keys")
    sequences, max_pages = page_tables.shape
    group = heads // kv_heads
    exact = precision == "exact"
    block_value = _padded(value_size)
    block_head, block_rest = (min(64, _padded(head_size)), 0) if exact else _pieces(head_size)
    # The first piece of a key may be its value: one read for both.
    offset = (value_cache.data_ptr() - key_cache.data_ptr()) // key_cache.itemsize
    end = head_size - block_head
    latent = not exact and value_size == block_head and value_stride == head_size and offset in (0, end)
    output = torch.empty((tokens, heads, value_size), dtype=torch.float32, device=q.device)
    activations = Activations(output.flatten(1))
    arriving, pairs, interleaving = (None, None), 0, False
    if fresh is not None:
        k, v, cos, sin, slots, interleaved = fresh
        if max_query == 1 and not exact:
            arriving = fresh_arguments(k, v, cos, sin, slots)
            pairs, interleaving = cos.shape[1], interleaved
        else:
            caches = key_cache, None if v is None else value_cache
            scales = {"key_scales": key_scales, "value_scales": value_scales}
            rotary_and_cache(q, k, v, cos, sin, *caches, slots, interleaved, **scales)

    def launch(single: bool) -> None:
        widest = max(_padded(head_size), block_value)
        itemsize = 4 if key_scales is not None else key_cache.itemsize  # widened 8 bits take registers beside the rest
        tile = _tile(widest, widest * itemsize, group, single, precision)
        tile["BLOCK_KEYS"] = min(tile["BLOCK_KEYS"], page)
        tiles = triton.cdiv(group * (1 if single else max_query), tile["BLOCK_ROWS"])
        splits = 1
        if single:
            longest = min(max_pages * page, window + tile["BLOCK_KEYS"] if window else max_pages * page)
            steps = triton.cdiv(longest, tile["BLOCK_KEYS"])
            wanted = triton.cdiv(_wanted_programs(q.device), tiles * kv_heads * sequences)
            splits = min(wanted, steps, MAX_SPLITS)
        rows = min(triton.next_power_of_2(group), tile["BLOCK_ROWS"])
        combining = splits > 1 and rows * block_value <= MAX_COMBINED
        partial = log_sums = None
        if splits > 1:
            partial = torch.empty((sequences, heads, splits, value_size), dtype=torch.float32, device=q.device)
            log_sums = torch.empty((sequences, heads, splits), dtype=torch.float32, device=q.device)
        whole = prepare and max_query == 1 and value_size % 32 == 0  # every row comes from here, in whole groups
        wanted_limbs = activations.wanted_limbs(precision) if whole else 0
        limbs = activations.new_limbs(wanted_limbs) if wanted_limbs else None
        attention_kernel[(tiles * splits, kv_heads, sequences)](
            q,
            *arriving,
            key_cache,
            value_cache,
            key_scales,
            value_scales,
            page_tables,
            query_starts,
            context_lengths,
            sinks,
            slopes,
            output,
            limbs,
            partial,
            log_sums,
            counters(q.device) if combining else None,
            kv_heads,
            max_pages,
            splits,
            *q.stride()[:2],
            scale,
            float(soft_cap),
            GROUP=group,
            HEAD_SIZE=head_size,
            VALUE_SIZE=value_size,
            VALUE_STRIDE=value_stride,
            FIRST=offset if latent and block_rest else 0,
            BLOCK_HEAD=block_head,
            BLOCK_REST=block_rest,
            BLOCK_VALUE=block_value,
            PAGE=page,
            EXACT=exact,
            LATENT=latent,
            CAUSAL=causal,
            WINDOW=window,
            CHUNKED=chunked,
            CAPPED=soft_cap != 0.0,
            SINGLE=single,
            PAIRS=pairs,
            INTERLEAVED=interleaving,
            LIMBS=wanted_limbs,
            COMBINED_ROWS=rows if combining else 0,
            COMBINED_SPLITS=min(MAX_SPLITS, BLOCK_COMBINED // (rows * block_value)) if combining else 0,
            enable_fp_fusion=True,
            **tile,
            **dependent_launch(),
        )
        if splits > 1 and not combining:
            combine_kernel[(heads, sequences)](
                partial,
                log_sums,
                query_starts,
                context_lengths,
                output,
                limbs,
                heads,
                splits,
                LIMBS=wanted_limbs,
                VALUE_SIZE=value_size,
                BLOCK_VALUE=block_value,
                BLOCK_KEYS=tile["BLOCK_KEYS"],
                BLOCK_SPLITS=min(MAX_SPLITS, BLOCK_COMBINED // block_value),
                WINDOW=window,
                CHUNKED=chunked,
                num_warps=max(4, block_value // 32),
                enable_fp_fusion=True,
                **dependent_launch(),
            )

    if max_query > 1:
        launch(single=False)
    if max_query == 1 or sequences > 1:
        launch(single=True)
    return activations if prepare else output
