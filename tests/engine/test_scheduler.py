"""The scheduler and the pages it hands out, without a model: a step is played by booking its chunks."""

from __future__ import annotations

import pytest

from trichord.cache import PAGE_SIZE, PagePool, pages_for
from trichord.completion_text import CompletionText
from trichord.sampling_params import SamplingParams
from trichord.scheduler import Scheduler
from trichord.sequence import Sequence


def sequence(prompt: list[int], new_tokens: int = 8) -> Sequence:
    return Sequence(prompt, SamplingParams(), CompletionText(None, ()), frozenset(), limit=len(prompt) + new_tokens)


def prompt(length: int, seed: int) -> list[int]:
    return [seed * 10_000 + i for i in range(length)]


def step(scheduler: Scheduler) -> list[tuple[Sequence, int]]:
    """Plays one step: every completed sequence draws token 7."""
    chunks = scheduler.schedule()
    for chunk in chunks:
        draws = chunk.draws
        scheduler.computed(chunk)
        if draws:
            chunk.sequence.append(7)
        if chunk.sequence.finished:
            scheduler.retire(chunk.sequence)
    return [(chunk.sequence, chunk.count) for chunk in chunks]


def pages_owned(scheduler: Scheduler) -> list[int]:
    return [page for running in scheduler.running for page in running.pages]


def test_long_prompts_are_cut_to_the_budget_and_decodes_come_first():
    scheduler = Scheduler(PagePool(16), max_batch_tokens=100, max_sequences=8)
    short, long = sequence(prompt(10, 1)), sequence(prompt(250, 2))
    scheduler.add(short)
    scheduler.add(long)
    assert step(scheduler) == [(short, 10), (long, 90)]
    assert step(scheduler) == [(short, 1), (long, 99)]
    assert step(scheduler) == [(short, 1), (long, 61)]
    assert step(scheduler) == [(short, 1), (long, 1)]
    assert long.completion_ids == [7, 7]


def test_admission_waits_for_the_pages_of_the_whole_prompt():
    scheduler = Scheduler(PagePool(4), max_batch_tokens=1000, max_sequences=8)
    first, second = sequence(prompt(3 * PAGE_SIZE - 20, 1), 2), sequence(prompt(2 * PAGE_SIZE, 2), 2)
    scheduler.add(first)
    scheduler.add(second)
    assert [s for s, _ in step(scheduler)] == [first]
    assert step(scheduler) == [(first, 1)]
    assert first.finished and first.finish_reason == "length"
    assert step(scheduler) == [(second, 2 * PAGE_SIZE)]


def test_max_sequences_bounds_the_batch():
    scheduler = Scheduler(PagePool(64), max_batch_tokens=1000, max_sequences=3)
    for seed in range(5):
        scheduler.add(sequence(prompt(4, seed), 2))
    assert len(step(scheduler)) == 3
    assert len(step(scheduler)) == 3  # they finish here
    assert len(step(scheduler)) == 2


def test_the_last_admitted_yields_its_pages_and_is_computed_again():
    scheduler = Scheduler(PagePool(3), max_batch_tokens=1000, max_sequences=8)
    first, second = sequence(prompt(PAGE_SIZE, 1), PAGE_SIZE + 5), sequence(prompt(PAGE_SIZE, 2), PAGE_SIZE)
    scheduler.add(first)
    scheduler.add(second)
    drawn = {first: 0, second: 0}
    for _ in range(1000):
        before = {s: len(s.completion_ids) for s in drawn}
        step(scheduler)
        assert len(set(pages_owned(scheduler))) == len(pages_owned(scheduler))
        for s in drawn:
            drawn[s] += len(s.completion_ids) - before[s]
        if first.finished and second.finished:
            break
    assert scheduler.preemptions > 0
    assert drawn == {first: PAGE_SIZE + 5, second: PAGE_SIZE}
    assert scheduler.pool.free_pages == 3


def test_abort_frees_pages_of_waiting_and_running():
    scheduler = Scheduler(PagePool(2), max_batch_tokens=1000, max_sequences=8)
    running, waiting = sequence(prompt(100, 1)), sequence(prompt(100, 2))
    scheduler.add(running)
    scheduler.add(waiting)
    step(scheduler)
    scheduler.retire(waiting)
    scheduler.retire(running)
    assert not scheduler.waiting and not scheduler.running and scheduler.pool.free_pages == 2


def test_a_known_beginning_is_taken_over_page_by_page():
    scheduler = Scheduler(PagePool(16), max_batch_tokens=1000, max_sequences=8)
    shared = prompt(2 * PAGE_SIZE + 9, 1)
    first = sequence([*shared, 1, 2, 3], 30)
    scheduler.add(first)
    step(scheduler)
    second = sequence([*shared, 4, 5], 30)
    scheduler.add(second)
    assert (second, 9 + 2) in step(scheduler)
    assert second.pages[:2] == first.pages[:2] and second.pages[2] != first.pages[2]
    scheduler.retire(first)
    assert step(scheduler) == [(second, 1)]
    third = sequence(shared[:PAGE_SIZE] + prompt(PAGE_SIZE, 3), 30)  # diverges after one page
    scheduler.add(third)
    assert (third, PAGE_SIZE) in step(scheduler)
    assert third.pages[0] == second.pages[0]


def test_a_prompt_of_whole_pages_still_computes_its_last_token():
    scheduler = Scheduler(PagePool(8), max_batch_tokens=1000, max_sequences=8)
    for _ in range(2):
        scheduler.add(sequence(prompt(2 * PAGE_SIZE, 1), 2))
        counts = [count for _, count in step(scheduler)]
        step(scheduler)
    assert counts == [PAGE_SIZE]


def test_reported_prompts_are_never_taken_from_known_pages():
    scheduler = Scheduler(PagePool(8), max_batch_tokens=1000, max_sequences=8)
    scheduler.add(sequence(prompt(100, 1), 1))
    step(scheduler)
    reported = sequence(prompt(100, 1), 1)
    reported.prompt_report = "logits"
    scheduler.add(reported)
    assert step(scheduler) == [(reported, 100)]


def test_handing_out_a_page_forgets_what_it_held():
    pool = PagePool(2)
    tokens = prompt(2 * PAGE_SIZE, 1)
    pages = pool.allocate(2)
    pool.remember(pages, tokens, 0, 2)
    pool.release(pages)
    assert pool.match([*tokens, 0]) == pages
    assert pool.allocate(1) == [pages[1]]  # the end of a prefix goes before its beginning
    assert pool.match([*tokens, 0]) == pages[:1]


@pytest.mark.parametrize(("positions", "pages"), [(0, 0), (1, 1), (PAGE_SIZE, 1), (PAGE_SIZE + 1, 2)])
def test_pages_for(positions, pages):
    assert pages_for(positions) == pages
