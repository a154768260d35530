"""The scheduler: which sequences compute how many tokens in the next step.

Sequences join and leave at every step. Running ones come first, in the order they were admitted; what is left of the
token budget admits waiting ones, as long as the pages of their whole prompt are free. Long prompts are cut to the
budget. When a running sequence finds no page, the one admitted last gives up its pages and waits again: what it had
computed is computed anew (or found in the pages it left behind).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from trichord.cache import PAGE_SIZE, PagePool, pages_for
from trichord.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """The tokens of a sequence from `start` to `end`, to be computed in one step.

    The last one may be on its way: drawn, but not read yet.
    """

    sequence: Sequence
    start: int
    end: int

    @property
    def count(self) -> int:
        """How many tokens these are."""
        return self.end - self.start

    @property
    def completes(self) -> bool:
        """Whether this chunk reaches the last token that the sequence has."""
        return self.end >= len(self.sequence.tokens)

    @property
    def draws(self) -> bool:
        """Whether the sequence's next token is drawn after this chunk."""
        return self.completes and self.sequence.generates

    @property
    def logit_rows(self) -> int:
        """How many of the chunk's last positions need logits: those to be reported, else the one that draws."""
        if not self.sequence.owes_prompt_results:
            return int(self.completes)
        return max(self.end - max(self.start, self.sequence.report_from), 0)


class Scheduler:
    """Waiting and running queues over one pool of pages. Without `splitting`, a prompt is computed in one step."""

    def __init__(self, pool: PagePool, max_batch_tokens: int, max_sequences: int, splitting: bool = True) -> None:
        self.splitting = splitting
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._free_slots = list(range(max_sequences))
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. Its limit must fit the pool, or it would wait forever."""
        assert pages_for(sequence.limit) <= self.pool.size
        self.waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, their pages taken; empty when there is nothing to do."""
        chunks: list[Chunk] = []
        budget = self.max_batch_tokens
        for sequence in list(self.running):
            if budget == 0:
                break
            if sequence not in self.running:  # preempted by one before it
                continue
            chunk = _next_chunk(sequence, budget)
            if self._grow(sequence, chunk.end):
                chunks.append(chunk)
                budget -= chunk.count
        while budget and self.waiting and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            if not self.splitting and chunks and len(sequence.tokens) > budget:
                break
            if not self._admit(sequence):
                break
            self.running.append(self.waiting.popleft())
            chunks.append(_next_chunk(sequence, budget if self.splitting else len(sequence.tokens)))
            budget = max(0, budget - chunks[-1].count)
        return chunks

    def following(self, chunks: list[Chunk]) -> list[Chunk] | None:
        """The chunks of the step after one of these: of the token that each of them draws. Their pages are taken.

        None where the tokens decide about it, or others: one is the last of its sequence, or takes a page that is not
        free, or somebody else may join.
        """
        joining = self.waiting and len(self.running) < self.max_sequences
        if joining or [chunk.sequence for chunk in chunks] != self.running:
            return None
        if any(chunk.end + 1 >= chunk.sequence.limit for chunk in chunks):
            return None
        if sum(pages_for(chunk.end + 1) - len(chunk.sequence.pages) for chunk in chunks) > self.pool.free_pages:
            return None
        for chunk in chunks:
            self._grow(chunk.sequence, chunk.end + 1)
        return [Chunk(chunk.sequence, chunk.end, chunk.end + 1) for chunk in chunks]

    def computed(self, chunk: Chunk) -> None:
        """Books a chunk whose keys and values are in the caches; its full pages become known to later prompts."""
        sequence = chunk.sequence
        sequence.computed = chunk.end
        full = sequence.computed // PAGE_SIZE
        self.pool.remember(sequence.pages, sequence.tokens, sequence.remembered_pages, full)
        sequence.remembered_pages = full

    def retire(self, sequence: Sequence) -> None:
        """Takes a finished sequence out of its queue and gives its pages back."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def _admit(self, sequence: Sequence) -> bool:
        known = [] if sequence.owes_prompt_results else self.pool.match(sequence.tokens)
        needed = pages_for(len(sequence.tokens)) - len(known)
        if needed > self.pool.free_pages - self.pool.idle(known):
            return False
        self.pool.share(known)
        sequence.pages = known + self.pool.allocate(needed)
        sequence.slot = self._free_slots.pop()
        sequence.computed = sequence.reused = len(known) * PAGE_SIZE
        sequence.remembered_pages = len(known)
        return True

    def _grow(self, sequence: Sequence, positions: int) -> bool:
        """Gives the sequence pages for so many positions, preempting later ones; False if it had to yield itself."""
        needed = pages_for(positions) - len(sequence.pages)
        while needed > self.pool.free_pages:
            victim = self.running[-1]
            self.preempt(victim)
            if victim is sequence:
                return False
        if needed > 0:
            sequence.pages += self.pool.allocate(needed)
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Takes everything from a running sequence and makes it the next to be admitted, to be computed anew."""
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        if sequence.owes_prompt_results:  # they will be computed from the start again
            sequence.prompt_results.clear()
        sequence.pages = []
        if sequence.slot >= 0:
            self._free_slots.append(sequence.slot)
            sequence.slot = -1
        sequence.computed = 0
        sequence.remembered_pages = 0


def _next_chunk(sequence: Sequence, budget: int) -> Chunk:
    return Chunk(sequence, sequence.computed, min(len(sequence.tokens), sequence.computed + budget))
