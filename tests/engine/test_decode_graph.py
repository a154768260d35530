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
from trichord.scheduler import Chunk
from trichord.sequence import Sequence

PROMPTS = [[1, 2, 3], [7], list(range(10, 80)), [5, 4], [250, 3, 9, 9]]
SCRATCH = Scratch(page=9, slot=4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


class Captures:
    """Stands in for the capture of graphs: it runs a computation once, and again at every replay."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.captured = self.replayed = 0

    sizes, patience = (1, 2, 4, 8), 0

    def __call__(self, compute, reset):
        if self.error:
            raise self.error
        compute()
        self.captured += 1

        def replay():
            self.replayed += 1
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
def test_recurrent_states_are_those_without_graphs(name, monkeypatch):
    path = parity(f"archs/{name}.gguf")
    prompts, lengths = [[1, 2, 3], [7], [5, 4]], (4, 3, 2)
    captures = Captures()
    options = {"context_length": 96, "max_sequences": 3}
    llm = model(path, captures, monkeypatch, **options)
    expected = completions(model(path, None, monkeypatch, **options), prompts, lengths)
    assert completions(llm, prompts, lengths) == expected
    assert completions(llm, prompts, lengths) == expected  # in slots that were used before
    assert captures.replayed


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
        ("qwen3moe-moe", []),  # which experts are met is decided in Python
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
