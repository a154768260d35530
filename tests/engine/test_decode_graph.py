"""Steps through static inputs, with an eager stand-in for the captured graph: the same tensors, computed anew."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from host_reads import CONSTANTS, READS, Calls
from support import parity
from tiny_model import write_tiny_model

from trichord import LLM, SamplingParams
from trichord.batch import Batch
from trichord.cache import PAGE_SIZE
from trichord.completion_text import CompletionText
from trichord.decode_graph import DecodeInputs, Scratch, padded, padded_size, scratch_batch
from trichord.sampling import Drawn
from trichord.scheduler import Chunk
from trichord.sequence import Sequence

PROMPTS = [[1, 2, 3], [7], list(range(10, 80)), [5, 4], [250, 3, 9, 9]]
SCRATCH = Scratch(page=9, slot=4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


class Captures:
    """Stands in for the capture of graphs: it runs a computation once, and again at every replay."""

    def __init__(self, error: Exception | None = None, ahead: bool = False) -> None:
        self.error, self.ahead = error, ahead
        self.captured = self.replayed = 0

    sizes, patience = (1, 2, 4, 8), 0

    def launched(self) -> None:
        """Called with each replay."""

    def __call__(self, compute, reset):
        if self.error:
            raise self.error
        compute()
        self.captured += 1

        def replay():
            self.replayed += 1
            self.launched()
            return compute()

        return replay


def model(path, captures, monkeypatch, **options) -> LLM:
    monkeypatch.setattr("trichord.llm.capture_for", lambda model: captures)
    return LLM(path, precision="exact", **{"device": "cpu", "context_length": 128, "max_sequences": 8, **options})


def completions(llm, prompts=PROMPTS, lengths=(9, 12, 3, 7, 20)) -> list[list[int]]:
    """Of different lengths, so that sequences leave one after the other."""
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths]
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def decoding(tokens: int, pages: list[int], slot: int = 0) -> Chunk:
    """The last of so many tokens, numbered from 100."""
    ids = list(range(100, 100 + tokens))
    sequence = Sequence(
        ids, SamplingParams(), CompletionText(None, ()), frozenset(), limit=1000, pages=pages, slot=slot
    )
    return Chunk(sequence, tokens - 1, tokens)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tokens_are_those_without_graphs(tiny, device, monkeypatch):
    prompts, lengths = (PROMPTS, (9, 12, 3, 7, 20)) if device == "cpu" else ([[1, 2, 3], [7], [5, 4]], (3, 2, 3))
    captures = Captures()
    with_graphs = completions(model(tiny, captures, monkeypatch, device=device), prompts, lengths)
    assert captures.replayed
    assert with_graphs == completions(model(tiny, captures, monkeypatch, device=device, graphs=False), prompts, lengths)


def test_sequences_that_join_and_leave_change_the_size(tiny, monkeypatch):
    captures = Captures()
    llm = model(tiny, captures, monkeypatch, max_batch_tokens=80)
    expected = completions(model(tiny, None, monkeypatch))
    assert completions(llm) == expected
    assert completions(llm) == expected  # now with graphs of an earlier run
    assert captures.captured == 4  # of 1, 2, 4 and 8 rows, from five sequences down to one


def test_idle_rows_write_to_the_scratch_page_only(tiny, monkeypatch):
    captures = Captures()
    llm = model(tiny, captures, monkeypatch, max_sequences=3)
    completions(llm, PROMPTS[:3], (5, 5, 5))
    free = llm._engine.scheduler.pool.size
    for (cache,) in llm._engine.caches:
        used = {page for page in range(free + 1) if cache.keys[page].any()}
        assert free in used
        assert len(used - {free}) == 4  # one page for each of the short ones, two for 75 positions


@pytest.mark.parametrize("name", ["qwen3next-moe", "lfm2-dense"])
@pytest.mark.parametrize("ahead", [False, True])
def test_recurrent_states_are_those_without_graphs(name, ahead, monkeypatch):
    path = parity(f"archs/{name}.gguf")
    prompts, lengths = [[1, 2, 3], [7], [5, 4]], (4, 3, 2)
    captures = Captures(ahead=ahead)
    options = {"context_length": 96, "max_sequences": 3}
    llm = model(path, captures, monkeypatch, **options)
    expected = completions(model(path, None, monkeypatch, **options), prompts, lengths)
    assert completions(llm, prompts, lengths) == expected
    assert completions(llm, prompts, lengths) == expected  # in slots that were used before
    assert captures.replayed


WAYS_TO_DRAW = {
    "greedy": {"temperature": 0},
    "truncated": {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "temperature": 0.8},
    "biased": {"logit_bias": {5: 3.0, 9: -2.0}},
    "reported": {"logprobs": 3},
    "stopping at a token": {"stop_token_ids": list(range(0, 256, 9))},
    "stopping at a string": {"stop": ["a", "e", "7"]},
    "several": {"n": 3},
    "penalized": {"repetition_penalty": 1.3, "frequency_penalty": 0.2},
    "unlike one another": None,
}


def all_of(llm: LLM, ways: list[dict]) -> list:
    """Everything of the completions of PROMPTS: tokens, text, probabilities, how they ended."""
    lengths = (9, 12, 3, 7, 20)
    params = [
        SamplingParams(**{"max_tokens": length, "seed": length, **way})
        for length, way in zip(lengths, ways, strict=True)
    ]
    return [output.outputs for output in llm.generate(PROMPTS, params)]


@pytest.mark.parametrize("name", WAYS_TO_DRAW)
@pytest.mark.parametrize("sequences", [8, 2], ids=lambda count: f"{count} at once")
def test_steps_ahead_change_nothing(tiny, name, sequences, monkeypatch):
    """The next step begins before the tokens of the last one are read; ends that are seen late leave no trace."""
    way = WAYS_TO_DRAW[name]
    ways = [way] * len(PROMPTS) if way else list(WAYS_TO_DRAW.values())[: len(PROMPTS)]
    options = {"max_sequences": sequences, "max_batch_tokens": 40}
    ahead, plain = (model(tiny, Captures(ahead=each), monkeypatch, **options) for each in (True, False))
    for _ in range(2):  # then with pages and prefixes of an earlier run
        assert all_of(ahead, ways) == all_of(plain, ways)
    pool = ahead._engine.scheduler.pool
    assert pool.free_pages == pool.size


def events(llm: LLM, captures: Captures, monkeypatch, **params) -> list[str]:
    """What happens in which order: "launch" of a captured step, "read" of tokens."""
    log: list[str] = []
    read = Drawn.read
    monkeypatch.setattr(Drawn, "read", lambda drawn: log.append("read") or read(drawn))
    monkeypatch.setattr(captures, "launched", lambda: log.append("launch"))
    llm.generate([[1, 2, 3]], SamplingParams(ignore_eos=True, max_tokens=4, **params))
    return log


def test_a_step_is_launched_before_the_tokens_of_the_last_are_read(tiny, monkeypatch):
    captures = Captures(ahead=True)
    llm = model(tiny, captures, monkeypatch)
    steps = ["launch", "read"]
    assert events(llm, captures, monkeypatch) == [*steps, *steps, *steps, "read"]


@pytest.mark.parametrize(("ahead", "params"), [(True, {"presence_penalty": 0.5}), (False, {})])
def test_where_tokens_are_needed_first_they_are_read_first(tiny, ahead, params, monkeypatch):
    captures = Captures(ahead=ahead)
    llm = model(tiny, captures, monkeypatch)
    assert events(llm, captures, monkeypatch, **params) == ["read", *["launch", "read"] * 3]


def test_launching_ahead_waits_for_nothing(tiny, monkeypatch):
    llm = model(tiny, Captures(ahead=True), monkeypatch)
    made = []
    launch_next = llm._engine._launch_next

    def watched(launched):
        with Calls(*READS) as calls:
            following = launch_next(launched)
        made.extend(calls.made)
        return following

    monkeypatch.setattr(llm._engine, "_launch_next", watched)
    llm.generate([[1, 2, 3], [7]], SamplingParams(max_tokens=4, top_p=0.9, seed=1))
    assert not made


@pytest.mark.parametrize("name", ["tiny", "qwen3next-moe", "lfm2-dense"])
def test_a_token_that_the_host_must_draw_itself_takes_the_step_ahead_back(tiny, name, monkeypatch):
    """Too few candidates hold the mass of top_p: what was computed with no token counts for nothing, states too."""
    monkeypatch.setattr("trichord.sampling._CANDIDATES", 2)
    path = tiny if name == "tiny" else parity(f"archs/{name}.gguf")
    prompts, params = [[1, 2, 3], [7]], SamplingParams(top_p=0.5, temperature=0.6, seed=4, max_tokens=8)
    options = {"context_length": 96, "max_sequences": 3}
    llms = [model(path, captures, monkeypatch, **options) for captures in (Captures(ahead=True), None)]
    taken_back = []
    take_back = llms[0]._engine._take_back
    monkeypatch.setattr(llms[0]._engine, "_take_back", lambda chunks: taken_back.append(1) or take_back(chunks))
    ahead, plain = ([output.outputs for output in llm.generate(prompts, params)] for llm in llms)
    assert ahead == plain
    assert taken_back


def test_others_go_on_after_one_is_aborted_with_a_step_ahead(tiny, monkeypatch):
    llm = model(tiny, Captures(ahead=True), monkeypatch)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    stream = llm.stream([1, 2, 3], params)
    next(stream)
    stream.close()
    assert llm._engine._ahead is not None
    assert completions(llm) == completions(model(tiny, None, monkeypatch))


def test_a_step_that_fails_is_taken_again_with_what_was_ahead(tiny, monkeypatch):
    llm, failures = model(tiny, Captures(ahead=True), monkeypatch), [2]
    read = Drawn.read

    def failing(drawn):
        failures[0] -= 1
        if failures[0] == 0:
            raise KeyboardInterrupt
        return read(drawn)

    monkeypatch.setattr(Drawn, "read", failing)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2, 3]], params)
    assert llm._engine._ahead is None
    assert completions(llm) == completions(model(tiny, None, monkeypatch))


def test_failure_to_capture_warns_once_and_goes_on(tiny, monkeypatch):
    llm = model(tiny, Captures(RuntimeError("operation not permitted when stream is capturing")), monkeypatch)
    with pytest.warns(UserWarning, match="could not be captured: operation not permitted") as caught:
        tokens = completions(llm)
    assert len(caught) == 1
    assert tokens == completions(model(tiny, None, monkeypatch))


def test_prompts_and_reports_go_around_the_graphs(tiny, monkeypatch):
    captures = Captures()
    llm = model(tiny, captures, monkeypatch)
    logits = llm.logits([1, 2, 3])
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert captures.captured == 0
    np.testing.assert_array_equal(logits, model(tiny, None, monkeypatch).logits([1, 2, 3]))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama-dense", [1, 2, 3, 4]),
        ("qwen2-dense", [1, 2, 3, 4]),
        ("gemma2-dense", [1, 2, 3, 4]),
        ("minicpm3-dense", [1, 2, 3, 4]),
        ("qwen35-dense", [1, 2, 3, 4]),
        ("mamba2-dense", [1, 2, 3, 4]),
        ("qwen3moe-moe", [1, 2, 3, 4]),
    ],
)
def test_recorded_steps_give_the_same_tokens(name, sizes):
    """Sequences of different lengths, twice, so that every number of them is met often enough to be recorded."""
    pytest.importorskip("numba")
    prompts, lengths = [[1, 2, 3], [7], [5, 4], [9, 8, 7, 6]], (26, 19, 12, 32)
    options = {"device": "cpu", "context_length": 128, "max_sequences": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorded = LLM(parity(f"archs/{name}.gguf"), **options)
        without = LLM(parity(f"archs/{name}.gguf"), graphs=False, **options)
        for _ in range(2):
            assert completions(recorded, prompts, lengths) == completions(without, prompts, lengths)
    assert sorted(size for size, (_, _, replay) in recorded._engine._graphs._graphs.items() if replay) == sizes


def test_layers_apart_have_no_graphs(tiny):
    assert LLM(tiny, device="cuda", gpu_layers=1, context_length=64)._engine._graphs is None


@pytest.mark.parametrize(("sequences", "size"), [(1, 1), (2, 2), (3, 4), (5, 8), (33, 64), (64, 64), (65, None)])
def test_padded_size(sequences, size):
    assert padded_size(sequences, (1, 2, 4, 8, 16, 32, 64)) == size


def test_padding_keeps_the_batch_and_idles_the_rest():
    batch = Batch.of([decoding(70, [3, 1], slot=2), decoding(5, [6], slot=0), decoding(1, [2], slot=3)])
    full = padded(batch, scratch_batch(4, 3, SCRATCH))
    assert full.token_ids.tolist() == [169, 104, 100, 0]
    assert full.positions.tolist() == [69, 4, 0, 0]
    assert full.slots.tolist() == [PAGE_SIZE + 5, 6 * PAGE_SIZE + 4, 2 * PAGE_SIZE, 9 * PAGE_SIZE]
    assert full.context_lengths.tolist() == [70, 5, 1, 1]
    assert full.page_tables[:, 0].tolist() == [3, 6, 2, 9]
    assert full.page_tables[0].tolist()[:2] == [3, 1]
    assert full.state_slots.tolist() == [2, 0, 3, 4]
    assert full.query_starts.tolist() == [0, 1, 2, 3, 4]
    assert full.logit_rows.tolist() == [0, 1, 2, 3]
    assert len(full.new_slots) == 0


@pytest.mark.parametrize(("size", "max_pages"), [(1, 1), (2, 3), (4, 8)])
def test_inputs_stay_where_they_are_and_hold_the_last_batch(size, max_pages):
    idle = scratch_batch(size, max_pages, SCRATCH)
    inputs = DecodeInputs(idle, torch.device("cpu"))
    names = [name for name, value in vars(idle).items() if isinstance(value, torch.Tensor)]
    places = [getattr(inputs.batch, name).data_ptr() for name in names]
    for tokens in (3, 9):
        batch = padded(Batch.of([decoding(tokens, [tokens])]), idle)
        inputs.load(batch)
        for name in names:
            assert getattr(inputs.batch, name).dtype == getattr(batch, name).dtype
            assert getattr(inputs.batch, name).is_contiguous()
            torch.testing.assert_close(getattr(inputs.batch, name), getattr(batch, name), rtol=0, atol=0)
    assert places == [getattr(inputs.batch, name).data_ptr() for name in names]


@pytest.mark.parametrize("name", ["llama-dense", "deepseek2-moe", "llama4-moe", "mamba2-dense", "qwen3next-moe"])
def test_a_step_of_single_tokens_can_be_captured(name):
    """It reads nothing of the device and makes no tensor of the host's numbers, once it has run."""
    llm = LLM(parity(f"archs/{name}.gguf"), device="cuda", context_length=64, max_sequences=2)
    model, caches = llm.model, llm._engine.caches
    batch = scratch_batch(1, 1, Scratch(page=0, slot=0))
    with torch.inference_mode():
        model.forward(batch, caches, "default")
        with Calls(*READS, *CONSTANTS) as calls:
            model.logits(model.forward(batch, caches, "default"), "default")
    assert not calls.made


def test_what_cannot_be_captured_is_found():
    with Calls(*READS, *CONSTANTS) as calls:
        rows = torch.tensor([1.0, 2.0])
        if (rows > 0).all():
            rows.nonzero()
    assert calls.made == ["aten::lift_fresh", "aten::_local_scalar_dense", "aten::nonzero"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama-dense", "qwen3moe-moe", "deepseek2-moe", "mamba-dense", "qwen3next-moe"])
def test_graphs_on_a_gpu_give_the_same_tokens(name, recwarn):
    llms = [
        LLM(parity(f"archs/{name}.gguf"), device="cuda", context_length=128, max_sequences=8, graphs=graphs)
        for graphs in (True, False)
    ]
    with_graphs, without = (completions(llm) for llm in llms)
    assert with_graphs == without
    assert sorted(llms[0]._engine._graphs._graphs) == [1, 2, 4, 8]
    assert not [warning for warning in recwarn if "captured" in str(warning.message)]
