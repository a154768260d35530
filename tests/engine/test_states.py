"""Sequences with recurrent states: slots that are taken, given back and computed anew never change a token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import parity

from trichord import LLM, SamplingParams
from trichord.errors import DeviceError

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def model(name: str = "qwen35-dense", **options) -> LLM:
    return LLM(parity(f"archs/{name}.gguf"), device="cpu", precision="exact", **options)


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 128, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def completions(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


@pytest.mark.parametrize("name", ["qwen35-dense", "mamba2-dense", "falcon-h1-dense", "lfm2-dense"])
def test_a_ragged_batch_gives_what_each_prompt_gives_alone(name):
    """More prompts than slots, of different lengths, that end after different numbers of tokens."""
    llm = model(name, max_sequences=3, max_batch_tokens=11)
    ragged = prompts(7, 30)
    params = [SamplingParams(temperature=0, max_tokens=3 + 2 * i, ignore_eos=True) for i in range(7)]
    alone = [completions(llm, [prompt], [each])[0] for prompt, each in zip(ragged, params, strict=True)]
    assert completions(llm, ragged, params) == alone
    assert sorted(llm._engine.scheduler._free_slots) == [0, 1, 2]


def sizes(llm: LLM) -> tuple[int, int]:
    """Bytes of a page and of a slot."""
    specs = [spec for layer in llm.model.layers for spec in layer.caches]
    return sum(spec.page_bytes(torch.float32) for spec in specs), sum(spec.slot_bytes for spec in specs)


def test_a_preempted_sequence_is_computed_anew():
    roomy = model("granitehybrid-dense", max_sequences=3)
    page, slot = sizes(roomy)
    assert 6 * page <= 3 * slot < 9 * page
    tight = model("granitehybrid-dense", max_sequences=3, cache_bytes=6 * slot)
    params = [SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)] * 3
    repeated = [pattern * (120 // len(pattern)) for pattern in ([3, 1], [4], [1, 5, 9])]
    expected = completions(roomy, repeated, params)
    assert completions(tight, repeated, params) == expected
    assert tight._engine.scheduler.preemptions > 0


@pytest.mark.parametrize(("name", "share"), [("qwen35-dense", 2), ("mamba2-dense", 1)])
def test_states_of_fewer_sequences_where_memory_lacks(name, share):
    """Where positions are remembered as well, states take half of the memory at most."""
    _, slot = sizes(model(name, max_sequences=1))
    with pytest.warns(UserWarning, match="memory for 2 of 5 sequences"):
        llm = model(name, max_sequences=5, cache_bytes=share * (2 * slot + slot // 2))
    ragged = prompts(4, 20)
    assert completions(llm, ragged, [GREEDY] * 4) == completions(model(name), ragged, [GREEDY] * 4)
    with pytest.raises(DeviceError, match="No memory for a sequence's"):
        model(name, cache_bytes=share * slot - 1)


def test_states_are_never_shared_by_prefix():
    llm = model(max_sequences=2)
    prompt = prompts(1, 1)[0] * 150
    first = llm.generate(prompt, GREEDY)[0].outputs[0].token_ids
    stream = llm.stream(prompt, GREEDY)
    list(stream)
    assert stream.reused_tokens == 0
    assert stream.output.outputs[0].token_ids == first


class Interruption(Exception):
    pass


def test_a_failed_step_leaves_no_half_moved_state(monkeypatch):
    llm = model(max_sequences=2)
    ours, theirs = ([5, 7, 9, 11], [6, 8])
    expected = completions(llm, [theirs], [GREEDY])[0]
    last, calls = llm.model.layers[-1], []
    forward = last.forward

    def failing(*arguments):
        calls.append(None)
        if len(calls) == 4:  # the first layer's states have moved on
            raise Interruption
        return forward(*arguments)

    monkeypatch.setattr(last, "forward", failing)
    (mine,), (other,) = (llm._request(prompt, GREEDY) for prompt in (ours, theirs))
    failed, going = llm._engine.run([mine]), llm._engine.run([other])
    next(failed)
    next(going)
    next(failed)
    with pytest.raises(Interruption):
        next(failed)
    assert mine.finish_reason == "abort" and not other.finished
    list(going)
    assert other.completion_ids == expected and len(calls) > 4
