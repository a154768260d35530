"""Attention over the paged cache: one flash-attention kernel for prompt chunks and for single tokens.

A program holds a tile of queries and walks the keys in steps, keeping a running maximum and sum of the softmax (online
softmax: Milakov and Gimelshein, 2018; Dao et al., 2022). The query heads that share a key-value head lie in the same
tile, as rows (token, head), so that its keys and values are read once for all of them. A single token gives too few
programs to fill a GPU: its context is split among several (flash decoding: Dao et al., 2023), and a second kernel
combines their results. A window of the context bounds the walk, so that nothing before it is read.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from trichord.triton_kernels.activations import Activations, store_limbs
from trichord.triton_kernels.attention_step import first_seen, load_rows, step

MAX_SPLITS = 64


@triton.jit
def _split_span(first, last, splits, BLOCK_KEYS: tl.constexpr):
    """Positions of one split of first:last: whole steps, so that no two splits meet inside one."""
    return tl.cdiv(tl.cdiv(last - first, BLOCK_KEYS), splits) * BLOCK_KEYS


@triton.jit(do_not_specialize=["max_pages", "splits"])  # they change as sequences grow: no new compilation for that
def attention_kernel(
    q,
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
    log_sums,
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
    PARTIAL: tl.constexpr,
):
    """One program a (tile of rows, split of the context), key-value head and sequence.

    Rows are the pairs (token, query head of the group). SINGLE: the sequences of one token, else those of several.
    PARTIAL: the splits' results go to output (S, H, splits, Dv) and the logarithms (base 2) of their softmax sums to
    log_sums (S, H, splits); else there is one split and output is (T, H, Dv). Of the pieces of a head, see `step`.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634  # exp(x) = exp2(x log2(e))
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2)
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // splits  # later tokens see more keys: the longest work first
    split = tl.program_id(0) % splits
    first_token = tl.load(query_starts + sequence)
    tokens = tl.load(query_starts + sequence + 1) - first_token
    length = tl.load(context_lengths + sequence)
    first_position = length - tokens + tile * BLOCK_ROWS // GROUP
    lowest = first_seen(first_position, WINDOW, CHUNKED)
    visible = length
    if CAUSAL:
        visible = tl.minimum(length, length - tokens + ((tile + 1) * BLOCK_ROWS - 1) // GROUP + 1)
    begin = lowest // BLOCK_KEYS * BLOCK_KEYS
    span = _split_span(begin, visible, splits, BLOCK_KEYS)
    begin += split * span
    end = tl.minimum(visible, begin + span)
    if ((tokens == 1) != SINGLE) | (tile * BLOCK_ROWS >= tokens * GROUP) | (begin >= end):
        return

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
        piece = load_rows(query_rows, used, FIRST, min(HEAD_SIZE, BLOCK_HEAD), BLOCK_HEAD)
        greatest = tl.max(tl.abs(piece), axis=1)
        rest = piece
        if BLOCK_REST > 0:
            rest = load_rows(query_rows, used, 0 if FIRST > 0 else BLOCK_HEAD, HEAD_SIZE - BLOCK_HEAD, BLOCK_REST)
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
):
    """One program a query head and sequence of one token: the means of its splits, weighted by their softmax sums."""
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    token = tl.load(query_starts + sequence)
    if tl.load(query_starts + sequence + 1) - token != 1:
        return
    length = tl.load(context_lengths + sequence)
    split = tl.arange(0, BLOCK_SPLITS)
    begin = first_seen(length - 1, WINDOW, CHUNKED) // BLOCK_KEYS * BLOCK_KEYS
    used = (split < splits) & (begin + split * _split_span(begin, length, splits, BLOCK_KEYS) < length)
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
    if LIMBS:
        group = tl.arange(0, BLOCK_VALUE // 32)[:, None]
        groups: tl.constexpr = VALUE_SIZE // 32
        store_limbs(tl.reshape(mean, (BLOCK_VALUE // 32, 32)), row * groups + group, group < groups, limbs, LIMBS)


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
    sum (Xiao et al., 2024). With `prepare`, the result is (T, H * Dv), as `matmul` reads it in this precision. Raises
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
        partial, log_sums = output, output
        if splits > 1:
            partial = torch.empty((sequences, heads, splits, value_size), dtype=torch.float32, device=q.device)
            log_sums = torch.empty((sequences, heads, splits), dtype=torch.float32, device=q.device)
        attention_kernel[(tiles * splits, kv_heads, sequences)](
            q,
            key_cache,
            value_cache,
            key_scales,
            value_scales,
            page_tables,
            query_starts,
            context_lengths,
            sinks,
            slopes,
            partial,
            log_sums,
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
            PARTIAL=splits > 1,
            enable_fp_fusion=True,
            **tile,
        )
        if splits > 1:
            whole = prepare and max_query == 1 and value_size % 32 == 0  # every row comes from here, in whole groups
            limbs = activations.wanted_limbs(precision) if whole else 0
            combine_kernel[(heads, sequences)](
                partial,
                log_sums,
                query_starts,
                context_lengths,
                output,
                activations.new_limbs(limbs) if limbs else None,
                heads,
                splits,
                LIMBS=limbs,
                VALUE_SIZE=value_size,
                BLOCK_VALUE=block_value,
                BLOCK_KEYS=tile["BLOCK_KEYS"],
                BLOCK_SPLITS=MAX_SPLITS,
                WINDOW=window,
                CHUNKED=chunked,
                num_warps=max(4, block_value // 32),
                enable_fp_fusion=True,
            )

    if max_query > 1:
        launch(single=False)
    if max_query == 1 or sequences > 1:
        launch(single=True)
    return activations if prepare else output
