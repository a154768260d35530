"""`LLM` from prompt to text, on a tiny random model: batching, limits, streaming, threads and what users get wrong."""

from __future__ import annotations

import gc
import random
import threading

import numpy as np
import pytest
from support import relative_error
from tiny_model import BOS, EOS, write_tiny_model

from trichord import LLM, SamplingParams
from trichord.errors import DeviceError, GGUFError, ModelError, RequestError, TokenizerError, TrichordError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def llm(path):
    return LLM(path, device="cpu", precision="exact")


def ragged_prompts(count: int, longest: int, seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def greedy_by_logits(llm: LLM, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache: the whole prefix is computed anew for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(llm.logits(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def test_generation_is_greedy_decoding_of_the_logits(llm):
    prompt = ragged_prompts(1, 40)[0]
    (output,) = llm.generate(prompt, GREEDY)
    assert output.outputs[0].token_ids == greedy_by_logits(llm, prompt, 12)
    assert output.prompt_token_ids == prompt and output.prompt is None
    assert output.outputs[0].finish_reason == "length"


def test_a_ragged_batch_gives_what_each_prompt_gives_alone(llm):
    prompts = ragged_prompts(9, 150)
    together = llm.generate(prompts, GREEDY)
    alone = [llm.generate([prompt], GREEDY)[0] for prompt in prompts]
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]
    assert [o.prompt_token_ids for o in together] == prompts


@pytest.mark.parametrize("options", [{"max_batch_tokens": 13}, {"cache_bytes": 9 * 2 * 64 * 2 * 32 * 4}])
def test_small_budgets_change_nothing(llm, path, options):
    prompts = ragged_prompts(12, 120, seed=2)
    params = [SamplingParams(max_tokens=30 + 7 * i, seed=50 + i, ignore_eos=True) for i in range(12)]
    small = LLM(path, device="cpu", precision="exact", **options)
    expected = llm.generate(prompts, params)
    assert [o.outputs for o in small.generate(prompts, params)] == [o.outputs for o in expected]
    if "cache_bytes" in options:
        assert small._engine.scheduler.preemptions > 0


def test_a_thousand_prompts_of_mixed_lengths_in_order(path):
    llm = LLM(path, device="cpu", precision="exact", cache_bytes=64 * 2 * 64 * 2 * 32 * 4)
    prompts = ragged_prompts(1000, 40, seed=3)
    params = [SamplingParams(temperature=0, max_tokens=1 + i % 5, ignore_eos=True) for i in range(1000)]
    outputs = llm.generate(prompts, params)
    assert [o.prompt_token_ids for o in outputs] == prompts
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1 + i % 5 for i in range(1000)]
    for i in (0, 333, 999):
        assert outputs[i].outputs == llm.generate([prompts[i]], params[i])[0].outputs
    assert llm._engine.scheduler.pool.free_pages == llm._engine.scheduler.pool.size


def test_streamed_pieces_are_the_generated_text(llm):
    params = SamplingParams(seed=4, max_tokens=60, temperature=1.5)
    stream = llm.stream("Hé€𝄞 ", params)
    pieces = list(stream)
    assert "".join(pieces) == llm.generate("Hé€𝄞 ", params)[0].outputs[0].text == stream.output.outputs[0].text
    assert all(pieces)


def test_text_prompts_get_the_beginning_token(llm):
    (output,) = llm.generate("ab", SamplingParams(max_tokens=1))
    assert output.prompt_token_ids == [BOS, ord("a"), ord("b")] and output.prompt == "ab"


def test_stop_token_and_stop_string_end_a_completion(llm):
    prompt = ragged_prompts(1, 20, seed=6)[0]
    free = llm.generate(prompt, SamplingParams(seed=1, max_tokens=40, ignore_eos=True))[0].outputs[0]
    token = free.token_ids[9]
    stopped = llm.generate(prompt, SamplingParams(seed=1, max_tokens=40, ignore_eos=True, stop_token_ids=[token]))
    end = free.token_ids.index(token)
    assert stopped[0].outputs[0].token_ids == free.token_ids[: end + 1]
    assert (stopped[0].outputs[0].finish_reason, stopped[0].outputs[0].stop_reason) == ("stop", token)
    string = free.text[5:8]
    stopped = llm.generate(prompt, SamplingParams(seed=1, max_tokens=40, ignore_eos=True, stop=[string]))[0].outputs[0]
    assert stopped.text == free.text[: free.text.index(string)] and stopped.stop_reason == string


def test_the_models_own_end_token_stops_unless_ignored(llm):
    towards_the_end = {"logit_bias": {EOS: 100.0}, "max_tokens": 5}
    (ended,) = llm.generate("x", SamplingParams(**towards_the_end))
    assert ended.outputs[0].token_ids == [EOS]
    assert (ended.outputs[0].text, ended.outputs[0].finish_reason) == ("", "stop")
    (going,) = llm.generate("x", SamplingParams(**towards_the_end, ignore_eos=True))
    assert going.outputs[0].token_ids == [EOS] * 5


def test_several_completions_differ_and_repeat_with_their_seed(llm):
    params = SamplingParams(n=3, seed=8, max_tokens=10, temperature=2.0)
    first, second = (llm.generate("abc", params)[0].outputs for _ in range(2))
    assert first == second
    assert [o.index for o in first] == [0, 1, 2] and len({tuple(o.token_ids) for o in first}) == 3
    assert first[0] == llm.generate("abc", SamplingParams(seed=8, max_tokens=10, temperature=2.0))[0].outputs[0]


def test_logprobs_are_those_of_the_logits(llm):
    prompt = ragged_prompts(1, 30, seed=9)[0]
    params = SamplingParams(max_tokens=4, seed=2, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    (output,) = llm.generate(prompt, params)
    completion = output.outputs[0]
    tokens = prompt + completion.token_ids
    logits = llm.logits(tokens).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt) and len(completion.logprobs) == 4
    for position, entries in enumerate([*output.prompt_logprobs[1:], *completion.logprobs], start=1):
        row = expected[position - 1]
        assert entries[tokens[position]].logprob == pytest.approx(row[tokens[position]], abs=1e-4)
        best = int(row.argmax())
        assert entries[best].rank == 1 and entries[best].logprob == pytest.approx(row[best], abs=1e-4)
    drawn = [entries[token].logprob for entries, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    assert completion.cumulative_logprob == pytest.approx(sum(drawn))


def test_the_context_ends_generation(path):
    llm = LLM(path, device="cpu", context_length=32)
    (output,) = llm.generate([[1] * 30], SamplingParams(ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 2 and output.outputs[0].finish_reason == "length"
    assert len(llm.logits([1] * 32)) == 32
    with pytest.raises(RequestError, match="32 tokens, but the context holds 32"):
        llm.generate([[1] * 32])
    with pytest.raises(RequestError, match="33 tokens"):
        llm.logits([1] * 33)


def test_threads_share_one_engine(llm):
    prompts = ragged_prompts(8, 60, seed=12)
    expected = [o.outputs for o in llm.generate(prompts, GREEDY)]
    results = [None] * len(prompts)

    def work(index: int) -> None:
        results[index] = llm.generate([prompts[index]], GREEDY)[0].outputs

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert results == expected


def test_leaving_a_stream_early_aborts_it(llm):
    scheduler = llm._engine.scheduler
    stream = llm.stream("abc", SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    assert scheduler.running
    stream.close()
    assert stream.output.outputs[0].finish_reason == "abort" and not scheduler.running
    stream = llm.stream("abc", SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    del stream
    gc.collect()
    assert not scheduler.running and scheduler.pool.free_pages == scheduler.pool.size


def test_a_failing_step_ends_its_requests_and_leaves_the_engine_usable(path, monkeypatch):
    llm = LLM(path, device="cpu", precision="exact")
    expected = llm.generate("abc", GREEDY)[0].outputs
    forward = llm.model.forward
    calls = iter([False, True])

    def interrupted(*arguments):
        if next(calls):
            raise KeyboardInterrupt
        return forward(*arguments)

    monkeypatch.setattr(llm.model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["abc", "de"], GREEDY)
    monkeypatch.setattr(llm.model, "forward", forward)
    assert not llm._engine.scheduler.running and not llm._engine.scheduler.waiting
    assert llm.generate("abc", GREEDY)[0].outputs == expected


def test_a_model_without_a_tokenizer_works_on_token_ids(tmp_path, llm):
    bare = LLM(write_tiny_model(tmp_path / "bare.gguf", tokenizer=False), device="cpu", precision="exact")
    assert relative_error(bare.logits([5, 6, 7]), llm.logits([5, 6, 7])) < 1e-6
    (output,) = bare.generate([[5, 6, 7]], GREEDY)
    assert output.outputs[0].text == "" and len(output.outputs[0].token_ids) == 12
    with pytest.raises(TokenizerError, match="token"):
        bare.generate("text")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([[]], "empty"),
        ([[1, 999]], "999 is outside the vocabulary of 259"),
        ([[-1]], "-1 is outside"),
        ([["a", "b"]], "text or a list of token ids"),
        ([b"ab"], "text or a list of token ids"),
    ],
)
def test_prompts_that_cannot_be_run(llm, prompt, message):
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "double"}, RequestError, "double"),
        ({"device": "tpu"}, DeviceError, "tpu"),
        ({"context_length": 0}, RequestError, "context_length"),
        ({"context_length": 100_000}, RequestError, "512"),
        ({"kv_dtype": "q4"}, RequestError, "q4"),
        ({"gpu_layers": 2}, DeviceError, "gpu_layers"),
        ({"gpu_layers": -1}, RequestError, "gpu_layers"),
        ({"threads": 0}, RequestError, "threads"),
        ({"max_sequences": 0}, RequestError, "max_sequences"),
        ({"cache_bytes": 10}, DeviceError, "cache"),
    ],
)
def test_options_that_cannot_be_honoured(path, options, error, message):
    with pytest.raises(error, match=message):
        LLM(path, **{"device": "cpu", **options})


def test_token_ids_outside_the_vocabulary_in_parameters(llm):
    with pytest.raises(RequestError, match="259"):
        llm.generate("a", SamplingParams(stop_token_ids=[259]))
    with pytest.raises(RequestError, match="3 prompts"):
        llm.generate(["a", "b", "c"], [SamplingParams()])


def test_a_cache_too_small_for_the_context_shortens_it(path):
    with pytest.warns(UserWarning, match="192 of 512"):
        llm = LLM(path, device="cpu", precision="exact", cache_bytes=3 * 2 * 64 * 2 * 32 * 4)
    assert llm.context_length == 192
    llm.generate([[1] * 191], SamplingParams(max_tokens=1))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(GGUFError, match=r"absent\.gguf"):
        LLM(tmp_path / "absent.gguf", device="cpu")


def test_the_triton_path_runs_from_prompt_to_text(llm, path):
    """Through the interpreter where there is no GPU; the draw is the same on both backends."""
    gpu = LLM(path, device="cuda", precision="exact", max_sequences=4)
    params = SamplingParams(seed=3, max_tokens=6)
    prompts = ["Tell me", "no", [7] * 70]
    assert [o.outputs for o in gpu.generate(prompts, params)] == [o.outputs for o in llm.generate(prompts, params)]


def test_models_that_do_not_fit_their_metadata(tmp_path, path):
    import gguf

    def rewritten(name: str, change) -> LLM:
        reader = gguf.GGUFReader(path)
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        fields = {key: field.contents() for key, field in reader.fields.items() if key.startswith("llama.")}
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
        change(fields, tensors)
        for key, value in fields.items():
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
        for key, value in tensors.items():
            writer.add_tensor(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return LLM(tmp_path / name, device="cpu")

    with pytest.raises(ModelError, match=r"'blk\.1\.ffn_down\.weight' is missing"):
        rewritten("missing.gguf", lambda fields, tensors: tensors.pop("blk.1.ffn_down.weight"))
    with pytest.raises(ModelError, match=r"'blk\.0\.attn_k\.weight' has shape \(32, 64\).*\(64, 64\)"):
        rewritten("heads.gguf", lambda fields, tensors: fields.update({"llama.attention.head_count_kv": 4}))
    with pytest.raises(ModelError, match="4 query heads cannot share 3"):
        rewritten("gqa.gguf", lambda fields, tensors: fields.update({"llama.attention.head_count_kv": 3}))
    with pytest.raises(GGUFError, match=r"llama\.block_count"):
        rewritten("layers.gguf", lambda fields, tensors: fields.pop("llama.block_count"))
    with pytest.raises(ModelError, match=r"'blk\.2\.attn_q\.weight' is missing"):
        rewritten("more.gguf", lambda fields, tensors: fields.update({"llama.block_count": 3}))
    with pytest.raises(ModelError, match=r"2147483647 layers, .* 21 tensors"):
        rewritten("most.gguf", lambda fields, tensors: fields.update({"llama.block_count": 2**31 - 1}))
    with pytest.raises(ModelError, match="head_count is 0"):
        rewritten("zero.gguf", lambda fields, tensors: fields.update({"llama.attention.head_count": 0}))
    with pytest.raises(ModelError, match="token_embd"):
        rewritten("vocabulary.gguf", lambda fields, tensors: tensors.pop("token_embd.weight"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_file_gives_a_result_or_one_clear_error(tmp_path, path):
    """Overwrites the header, from its counts to the tensor table, at seeded places."""
    data = path.read_bytes()
    header = data.index(b"blk.1.ffn_down.weight") + 64
    rng = random.Random(0)
    outcomes = set()
    for case in range(120):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 4])):
            at, width = rng.randrange(8, header), rng.choice([1, 4, 8])
            damaged[at : at + width] = rng.choice([rng.randbytes(width), b"\xff" * width, bytes(width)])
        target = tmp_path / f"{case}.gguf"
        target.write_bytes(damaged)
        try:
            damaged_llm = LLM(target, device="cpu", max_sequences=1)
            damaged_llm.logits([1, 2])
            if damaged_llm.tokenizer:
                damaged_llm.generate("hé", SamplingParams(max_tokens=1))
            outcomes.add("result")
        except TrichordError as error:
            assert "\n" not in str(error)
            outcomes.add("error")
    assert outcomes == {"result", "error"}
