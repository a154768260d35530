"""Caches: what a block declares, and the pages and slots that hold it.

A block says what it must remember of each position (`KeyValueSpec`, `LatentSpec`), or of a whole sequence
(`StateSpec`). The engine allocates tensors for it: of pages of PAGE_SIZE positions, or of slots, one a running
sequence. Sequences own lists of pages and a slot, the same indices in every layer. A full page is known by the tokens
up to its end, so that a later prompt with the same beginning takes it over instead of computing it again.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import numpy as np
import torch

PAGE_SIZE = 64
_SCALE_GROUP = 32  # elements of 8 bits that share a float16 scale, in `Operations.rotary_and_cache`


@dataclass(frozen=True)
class KeyValueSpec:
    """A layer's keys and values at every position: widths of its heads. torch.int8 stands for 8 bits with scales."""

    kv_heads: int
    key_size: int
    value_size: int

    def page_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one page of this layer."""
        numbers = (self.key_size + self.value_size) * dtype.itemsize
        scales = (_groups(self.key_size) + _groups(self.value_size)) * torch.float16.itemsize
        return PAGE_SIZE * self.kv_heads * (numbers + scales if dtype == torch.int8 else numbers)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one sequence's slot."""
        return 0

    def allocate(self, pages: int, slots: int, dtype: torch.dtype, device: torch.device) -> KeyValueCache:
        """Zeroed, because masked positions are multiplied by zero and must not be NaN."""

        def zeros(width: int, dtype: torch.dtype) -> torch.Tensor:
            return _zeros((pages, self.kv_heads, PAGE_SIZE, width), dtype, device)

        cache = KeyValueCache(zeros(self.key_size, dtype), zeros(self.value_size, dtype))
        if dtype != torch.int8:
            return cache
        scales = (zeros(_groups(size), torch.float16) for size in (self.key_size, self.value_size))
        return KeyValueCache(cache.keys, cache.values, *scales)


@dataclass(frozen=True)
class LatentSpec:
    """A latent at every position, from which all heads' keys and values follow, and a part of all keys that turns.

    It is small, and all depends on it: in a cache of 8 bits it keeps 16.
    """

    latent_size: int
    turning_size: int

    def page_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one page of this layer."""
        return PAGE_SIZE * (self.turning_size + self.latent_size) * _of_latents(dtype).itemsize

    @property
    def slot_bytes(self) -> int:
        """Bytes of one sequence's slot."""
        return 0

    def allocate(self, pages: int, slots: int, dtype: torch.dtype, device: torch.device) -> KeyValueCache:
        """One head of keys, the turning part before the latent; its values are a view of the latents."""
        size = self.turning_size + self.latent_size
        keys = _zeros((pages, 1, PAGE_SIZE, size), _of_latents(dtype), device)
        return KeyValueCache(keys, keys[..., self.turning_size :])


@dataclass(frozen=True)
class KeyValueCache:
    """One layer's pages: keys (P, G, PAGE_SIZE, D) and values (P, G, PAGE_SIZE, Dv); of 8 bits, with their scales."""

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None


@dataclass(frozen=True)
class StateSpec:
    """What a recurrent block carries from token to token: float32 tensors of these shapes for each sequence."""

    shapes: tuple[tuple[int, ...], ...]

    def page_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one page: none, positions leave nothing but the state."""
        return 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of one sequence's slot."""
        return 4 * sum(prod(shape) for shape in self.shapes)

    def allocate(self, pages: int, slots: int, dtype: torch.dtype, device: torch.device) -> StateCache:
        """One slot a sequence; a slot is zeroed when a sequence takes it."""
        return StateCache(tuple(torch.zeros(slots, *shape, device=device) for shape in self.shapes))


@dataclass(frozen=True)
class StateCache:
    """One block's states: tensors (slots, ...)."""

    states: tuple[torch.Tensor, ...]

    def clear(self, slots: torch.Tensor) -> None:
        """Zeroes these slots (int64)."""
        for state in self.states:
            state.index_fill_(0, slots, 0.0)


def _groups(size: int) -> int:
    return -(-size // _SCALE_GROUP)


def _of_latents(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype == torch.int8 else dtype


Cache: TypeAlias = KeyValueCache | StateCache
CacheSpec: TypeAlias = KeyValueSpec | LatentSpec | StateSpec


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, which on the CPU take no memory before they are written to: torch's own would."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, str(dtype).removeprefix("torch.")))


def pages_for(positions: int) -> int:
    """How many pages hold this many positions."""
    return -(-positions // PAGE_SIZE)


class PagePool:
    """Which pages are free, which are shared, and which computed prefix each full page ends.

    Freed pages keep their contents until they are handed out again, least recently used first. Without `sharing` no
    prefix is remembered: a recurrent state belongs to the end of its sequence only.
    """

    def __init__(self, pages: int, sharing: bool = True) -> None:
        self.size = pages
        self.sharing = sharing
        self._owners: defaultdict[int, int] = defaultdict(int)
        self._untouched = 0  # pages from here on were never handed out
        self._free: OrderedDict[int, None] = OrderedDict()
        self._page_of: dict[int, int] = {}
        self._prefix_of: dict[int, tuple[int, tuple[int, ...]]] = {}

    @property
    def free_pages(self) -> int:
        """Pages that can be handed out now."""
        return len(self._free) + self.size - self._untouched

    def allocate(self, count: int) -> list[int]:
        """Takes `count` pages; the caller has checked that they are free."""
        pages = []
        for _ in range(count):
            if self._untouched < self.size:
                page = self._untouched
                self._untouched += 1
            else:
                page, _ = self._free.popitem(last=False)
                self._forget(page)
            self._owners[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: list[int]) -> None:
        """Gives up one ownership of each page. Later pages of a prefix are reused before earlier ones."""
        for page in reversed(pages):
            self._owners[page] -= 1
            if not self._owners[page]:
                self._free[page] = None

    def remember(self, pages: list[int], tokens: list[int], start: int, stop: int) -> None:
        """Makes pages[start:stop], full with these tokens of a sequence, known to later prompts."""
        if not self.sharing:
            return
        key = self._key_before(pages, start)
        for index in range(start, stop):
            if key is None:
                return
            content = tuple(tokens[index * PAGE_SIZE : (index + 1) * PAGE_SIZE])
            parent, key = key, hash((key, content))
            page = pages[index]
            if page in self._prefix_of:
                continue
            if key in self._page_of:
                return
            self._page_of[key] = page
            self._prefix_of[page] = (key, (parent, *content))

    def match(self, tokens: list[int]) -> list[int]:
        """The longest run of known pages that begins like `tokens`, leaving at least one token to compute."""
        pages: list[int] = []
        key = 0
        for index in range((len(tokens) - 1) // PAGE_SIZE):
            content = tuple(tokens[index * PAGE_SIZE : (index + 1) * PAGE_SIZE])
            parent, key = key, hash((key, content))
            page = self._page_of.get(key)
            if page is None or self._prefix_of[page][1] != (parent, *content):
                break
            pages.append(page)
        return pages

    def idle(self, pages: list[int]) -> int:
        """How many of these pages nobody owns: sharing them takes them from the free ones."""
        return sum(not self._owners[page] for page in pages)

    def share(self, pages: list[int]) -> None:
        """Adds an owner to pages that `match` found."""
        for page in pages:
            self._free.pop(page, None)
            self._owners[page] += 1

    def _key_before(self, pages: list[int], index: int) -> int | None:
        if index == 0:
            return 0
        entry = self._prefix_of.get(pages[index - 1])
        return entry[0] if entry else None

    def _forget(self, page: int) -> None:
        entry = self._prefix_of.pop(page, None)
        if entry:
            del self._page_of[entry[0]]
