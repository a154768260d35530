"""Attention over the paged cache, in all its variants: both backends against float64 NumPy, row by row."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from support import eight_bits, from_eight_bits, relative_error

from trichord.dispatch import Operations, operations

# Triton's interpreter computes rows of a tile that belong to no query: 0 / 0, and log(0), never stored.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")


@dataclass(frozen=True)
class Backend:
    """A backend's operations and where its tensors live."""

    operations: Operations
    device: str


TRITON = Backend(operations("planes"), "cuda" if torch.cuda.is_available() else "cpu")
CPU = Backend(operations("blocks"), "cpu")
both = pytest.mark.parametrize("backend", [pytest.param(TRITON, id="triton"), pytest.param(CPU, id="cpu")])


def on(backend: Backend, array: np.ndarray) -> torch.Tensor:
    """A copy on the backend's device."""
    return torch.from_numpy(array.copy()).to(backend.device)


@dataclass(frozen=True)
class Case:
    """A ragged batch: (tokens, context) of each sequence, the shape of heads and cache, and the variant's keywords.

    `latent`: the values are a view of the keys, their elements from this one on.
    """

    sequences: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    size: int
    value_size: int
    page: int
    dtype: torch.dtype = torch.float32
    latent: int | None = None
    variant: dict = field(default_factory=dict)

    def __str__(self) -> str:
        runs = ",".join(f"{tokens}of{context}" for tokens, context in self.sequences)
        kind = str(self.dtype).rpartition(".")[2]
        values = f"v{self.value_size}" + ("" if self.latent is None else f"at{self.latent}")
        variant = "".join(f"-{name}{'' if value is True else value}" for name, value in self.variant.items())
        return f"{runs}-h{self.heads}g{self.kv_heads}-d{self.size}{values}-page{self.page}-{kind}{variant}"

    def keywords(self) -> dict:
        """The operation's keywords, as NumPy arrays where they are tensors."""
        heads = np.arange(1, self.heads + 1, dtype=np.float32)
        arrays = {"sinks": 3 * np.cos(heads), "slopes": 2 ** (-8 * heads / self.heads)}
        return {name: arrays.get(name, value) for name, value in self.variant.items()}

    def visible(self, tokens: int, context: int) -> np.ndarray:
        """Which positions (context) each query (tokens) sees."""
        window, chunked, causal = (
            self.variant.get(name, default) for name, default in (("window", 0), ("chunked", False), ("causal", True))
        )
        seen = np.zeros((tokens, context), bool)
        for row, p in enumerate(range(context - tokens, context)):
            first = 0 if not window else p // window * window if chunked else max(p - window + 1, 0)
            seen[row, first : p + 1 if causal else context] = True
        return seen


MIXED = (17, 17), (1, 16), (1, 130), (30, 75)

CASES = [
    Case(((1, 1),), 1, 1, 64, 64, 16),
    Case(((1, 130), (1, 2), (1, 15)), 4, 1, 64, 64, 16, torch.float16),
    Case(((1, 65), (1, 64)), 7, 1, 40, 24, 64),
    Case(((1, 63),), 8, 8, 80, 80, 64, torch.float16),
    Case(((16, 16),), 2, 2, 64, 64, 16),
    Case(((17, 17), (1, 16), (2, 63)), 4, 1, 96, 96, 16, torch.float16),
    Case(((65, 65), (1, 130)), 7, 1, 40, 56, 64),
    Case(((15, 130), (1, 1), (1, 64)), 8, 2, 128, 64, 64, torch.float16),
    Case(((130, 130),), 2, 1, 64, 64, 64, torch.float16),
    Case(((3, 20), (0, 7), (1, 33)), 2, 1, 192, 128, 16),
]


HALF = torch.float16
LATENT = Case(((17, 17), (1, 16), (2, 63)), 16, 1, 576, 512, 64, HALF, latent=64)
CASES += [
    LATENT,
    Case(((1, 70), (3, 5)), 8, 1, 72, 64, 16, HALF, latent=0),
    Case(((1, 70), (3, 5)), 4, 2, 40, 21, 16, HALF, latent=19),
    Case(((1, 33), (18, 40)), 4, 4, 72, 72, 16, HALF),
    Case(((1, 33), (18, 40)), 4, 2, 256, 256, 64, HALF),
    Case(((1, 33), (3, 9)), 3, 1, 576, 512, 16),
]
VARIANTS = [
    Case(MIXED, heads, kv_heads, size, size, page, HALF, variant=variant)
    for (heads, kv_heads, size, page), variant in zip(
        itertools.cycle([(4, 2, 64, 16), (3, 1, 48, 64), (2, 2, 80, 16)]),
        [
            {"causal": False},
            {"window": 1},
            {"window": 20},
            {"window": 64},
            {"window": 1000},
            {"window": 20, "chunked": True},
            {"window": 64, "chunked": True},
            {"window": 33, "causal": False},
            {"soft_cap": 3.0},
            {"sinks": True},
            {"slopes": True},
            {"slopes": True, "causal": False},
        ],
        strict=False,
    )
]
ALL_AT_ONCE = {"window": 40, "soft_cap": 2.5, "sinks": True, "slopes": True}
CASES += [
    replace(LATENT, variant={"window": 50, "sinks": True}),
    Case(MIXED, 4, 2, 64, 64, 16, HALF, None, ALL_AT_ONCE),
]
BITS_8 = torch.int8
CASES += [
    Case(MIXED, 4, 2, 128, 128, 16, BITS_8),
    Case(((1, 130), (1, 2), (1, 15)), 7, 1, 80, 40, 64, BITS_8),
    Case(((1, 33), (18, 40)), 2, 2, 37, 20, 16, BITS_8),
    Case(((3, 20), (0, 7), (1, 33)), 4, 2, 192, 256, 16, BITS_8, None, ALL_AT_ONCE),
]

SINGLE = [case for case in CASES if all(tokens == 1 for tokens, _ in case.sequences)]
SINGLE += [
    replace(case, sequences=((1, 1), (1, 40), (1, 130)))
    for case in (*VARIANTS, LATENT, *CASES[-5:], CASES[11], CASES[12])
]


def attention_inputs(case: Case, backend: Backend):
    """q as a slice of a fused product, caches whose unseen positions are NaN, shuffled pages, junk in the tables.

    Returns the arguments of the operation up to max_query and scale, q, each sequence's keys and values, the starts.
    """
    generator = np.random.default_rng(5)
    starts = np.cumsum([0, *(tokens for tokens, _ in case.sequences)])
    counts = [-(-context // case.page) for _, context in case.sequences]
    order = generator.permutation(sum(counts) + 3)
    tables = np.full((len(counts), max(counts) + 1), 2**30, np.int32)
    keys = np.full((len(order), case.kv_heads, case.page, case.size), np.nan, np.float32)
    values = np.full((len(order), case.kv_heads, case.page, case.value_size), np.nan, np.float32)
    contexts = []
    for row, (tokens, context), count in zip(tables, case.sequences, counts, strict=True):
        pages, order = order[:count], order[count:]
        key = generator.standard_normal((context, case.kv_heads, case.size)).astype(np.float16)
        value = generator.standard_normal((context, case.kv_heads, case.value_size)).astype(np.float16)
        if case.dtype == BITS_8:  # what 8 bits can hold
            key, value = (from_eight_bits(*eight_bits(x)) for x in (key, value))
        if case.latent is not None:
            value = key[..., case.latent : case.latent + case.value_size]
        seen = np.flatnonzero(case.visible(tokens, context).any(axis=0)) if tokens else np.arange(0)
        keys[pages[seen // case.page], :, seen % case.page] = key[seen]
        values[pages[seen // case.page], :, seen % case.page] = value[seen]
        row[np.unique(seen // case.page)] = pages[np.unique(seen // case.page)]
        contexts.append((key.astype(np.float64), value.astype(np.float64)))
    fused = generator.standard_normal((starts[-1], case.heads * case.size + 8)).astype(np.float32)
    q = fused[:, : case.heads * case.size].reshape(-1, case.heads, case.size)
    stored = torch.float32 if case.dtype == BITS_8 else case.dtype  # 8 bits by `attend`
    key_cache = on(backend, keys).to(stored)
    value_cache = on(backend, values).to(stored)
    if case.latent is not None:
        value_cache = key_cache[..., case.latent : case.latent + case.value_size]
    arguments = (
        on(backend, fused)[:, : case.heads * case.size].unflatten(1, (case.heads, case.size)),
        key_cache,
        value_cache,
        on(backend, tables),
        on(backend, starts.astype(np.int32)),
        on(backend, np.array([context for _, context in case.sequences], np.int32)),
        max(tokens for tokens, _ in case.sequences),
        1.7 / case.size**0.5,
    )
    return arguments, q.astype(np.float64), contexts, starts


def attention_oracle(case: Case, q: np.ndarray, contexts: list, starts: np.ndarray) -> np.ndarray:
    """Softmax attention one sequence and head at a time."""
    keywords = case.keywords()
    cap, sinks, slopes = (keywords.get(name) for name in ("soft_cap", "sinks", "slopes"))
    expected = np.empty((len(q), case.heads, case.value_size))
    for (key, value), (tokens, context), start in zip(contexts, case.sequences, starts, strict=False):
        distances = np.arange(context) - np.arange(context - tokens, context)[:, None]
        for head in range(case.heads):
            kv_head = head // (case.heads // case.kv_heads)
            scores = q[start : start + tokens, head] @ key[:, kv_head].T * (1.7 / case.size**0.5)
            if cap:
                scores = cap * np.tanh(scores / cap)
            if slopes is not None:
                scores = scores + float(slopes[head]) * distances
            weights = np.exp(np.where(case.visible(tokens, context), scores, -np.inf))
            total = weights.sum(1, keepdims=True) + (0 if sinks is None else np.exp(float(sinks[head])))
            expected[start : start + tokens, head] = weights @ value[:, kv_head] / total
    return expected


def attend(backend: Backend, case: Case, arguments: tuple, precision: str, **keywords: object) -> torch.Tensor:
    """The operation on these arguments with the case's keywords."""
    keywords |= {
        name: on(backend, value.astype(np.float32)) if isinstance(value, np.ndarray) else value
        for name, value in case.keywords().items()
    }
    if case.dtype == BITS_8:
        q, *caches, tables, starts, lengths, max_query, scale = arguments
        (keys, key_scales), (values, value_scales) = (eight_bits(cache.cpu().numpy()) for cache in caches)
        arguments = q, on(backend, keys), on(backend, values), tables, starts, lengths, max_query, scale
        keywords |= {"key_scales": on(backend, key_scales), "value_scales": on(backend, value_scales)}
    return backend.operations.attention(*arguments, precision, **keywords)


@both
@pytest.mark.parametrize(
    "case, precision",
    [*itertools.product(CASES, ["exact", "default"]), *((case, "exact") for case in VARIANTS)],
    ids=str,
)
def test_attention(backend, case, precision):
    arguments, q, contexts, starts = attention_inputs(case, backend)
    y = attend(backend, case, arguments, precision)
    assert y.shape == (starts[-1], case.heads, case.value_size) and y.dtype == torch.float32
    error = relative_error(y.cpu(), attention_oracle(case, q, contexts, starts))
    assert error < (1e-6 if precision == "exact" or backend is CPU else 1e-3)


@both
@pytest.mark.parametrize("rotated, interleaved", [(1.0, False), (0.5, True)])
@pytest.mark.parametrize(
    "case, precision",
    [*((case, "default") for case in SINGLE), *((case, "exact") for case in (SINGLE[1], CASES[5], CASES[11]))],
    ids=str,
)
def test_fresh_keys_are_turned_and_written_first(backend, case, precision, rotated, interleaved):
    """The last positions are not in the cache: what is to come into it, turned back, is given beside it instead."""
    (q, keys, values, tables, *rest), oracle_q, contexts, starts = attention_inputs(case, backend)
    new = np.concatenate([np.arange(context - tokens, context) for tokens, context in case.sequences])
    rows = np.repeat(np.arange(len(case.sequences)), [tokens for tokens, _ in case.sequences])
    pages = tables.cpu().numpy()[rows, new // case.page]
    k, v = (cache.cpu().numpy()[pages, :, new % case.page].astype(np.float32) for cache in (keys, values))
    pairs = int(rotated * case.size) // 2
    angles = np.random.default_rng(6).standard_normal((starts[-1], pairs))
    turn = [on(backend, function(angles).astype(np.float32)) for function in (np.cos, np.sin)]
    q, k = (on(backend, turned(x, -angles, interleaved).astype(np.float32)) for x in (oracle_q, k))
    keys[on(backend, pages), :, on(backend, new % case.page)] = np.nan
    if case.latent is None:
        values[on(backend, pages), :, on(backend, new % case.page)] = np.nan
    v = None if case.latent is not None else on(backend, v)
    fresh = k, v, *turn, on(backend, pages.astype(np.int64) * case.page + new % case.page), interleaved
    y = attend(backend, case, (q, keys, values, tables, *rest), precision, fresh=fresh)
    error = relative_error(y.cpu(), attention_oracle(case, oracle_q, contexts, starts))
    assert error < (1e-6 if case.dtype == torch.float32 and (precision == "exact" or backend is CPU) else 1e-3)


def turned(x: np.ndarray, angles: np.ndarray, interleaved: bool) -> np.ndarray:
    """x (T, H, D) with its first pairs turned by angles (T, R/2), as complex numbers, in float64."""
    x, count = x.astype(np.float64), angles.shape[1]
    left, right = (slice(i, 2 * count, 2) if interleaved else slice(i * count, (i + 1) * count) for i in (0, 1))
    z = (x[..., left] + 1j * x[..., right]) * np.exp(1j * angles)[:, None]
    x[..., left], x[..., right] = z.real, z.imag
    return x


@pytest.mark.parametrize("case", CASES + VARIANTS, ids=str)
def test_attention_without_numba_in_several_blocks(case, monkeypatch):
    module = importlib.import_module("trichord.cpu_fallback.attention")
    for name, value in (("have_numba", lambda: False), ("_BLOCK_TOKENS", 16), ("_BLOCK_KEYS", 40)):
        monkeypatch.setattr(module, name, value)
    arguments, q, contexts, starts = attention_inputs(case, CPU)
    y = attend(CPU, case, arguments, "exact")
    assert relative_error(y, attention_oracle(case, q, contexts, starts)) < 1e-6


@both
@pytest.mark.parametrize("magnitude", [2.0**20, 2.0**-20])
def test_queries_beyond_the_range_of_half_precision(backend, magnitude):
    case = Case(((1, 40), (9, 9)), 2, 1, 64, 64, 16, torch.float16)
    (q, *cache, max_query, scale), oracle_q, contexts, starts = attention_inputs(case, backend)
    y = backend.operations.attention(q * magnitude, *cache, max_query, scale / magnitude, "default")
    assert relative_error(y.cpu(), attention_oracle(case, oracle_q, contexts, starts)) < 1e-3


@both
def test_arguments_are_left_alone(backend):
    arguments, *_ = attention_inputs(CASES[1], backend)
    before = [argument.clone() for argument in arguments[:6]]
    backend.operations.attention(*arguments, "default")
    for argument, copy in zip(arguments, before, strict=False):
        torch.testing.assert_close(argument, copy, rtol=0, atol=0, equal_nan=True)


@both
@pytest.mark.parametrize(
    "variant", [{}, {"window": 30, "sinks": True}, {"window": 24, "chunked": True, "slopes": True}], ids=str
)
def test_a_prompt_at_once_as_token_by_token(backend, variant):
    whole = Case(((70, 70),), 4, 2, 64, 64, 16, variant=variant)
    (q, *cache, _, _, _, scale), *_ = attention_inputs(whole, backend)
    at_once = attend(backend, whole, attention_inputs(whole, backend)[0], "exact")
    keys, values, tables = (torch.nan_to_num(t) if t.is_floating_point() else t for t in cache)
    for last in (1, 17, 31, 49, 70):
        starts, lengths = (on(backend, np.array(numbers, np.int32)) for numbers in ([0, 1], [last]))
        arguments = q[last - 1 : last], keys, values, tables, starts, lengths, 1, scale
        assert relative_error(attend(backend, whole, arguments, "exact").cpu(), at_once[last - 1 : last].cpu()) < 1e-6
