"""Perplexity against a float64 computation over the model's logits, and its chunks worked out by hand."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from tiny_model import BOS, write_tiny_model

from trichord import LLM, cli
from trichord.errors import RequestError
from trichord.perplexity import chunks, estimates, text_chunks

TEXT = "The quick brown fox jumps over the lazy dog, héllo! " * 4


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def llm(path):
    return LLM(path, device="cpu", precision="exact", max_batch_tokens=24)  # a chunk takes several steps


def negative_log_likelihoods(llm: LLM, tokens: list[int]) -> np.ndarray:
    """Of each token but the first, in float64."""
    logits = llm.logits(tokens).astype(np.float64)[:-1]
    highest = logits.max(-1)
    total = highest + np.log(np.exp(logits - highest[:, None]).sum(-1))
    return total - logits[np.arange(len(logits)), tokens[1:]]


def test_chunks_by_hand():
    tokens = list(range(10, 20))
    assert chunks(tokens, 4) == [[10, 11, 12, 13], [14, 15, 16, 17]]
    assert chunks(tokens, 5, bos_id=1) == [[1, 11, 12, 13, 14], [1, 16, 17, 18, 19]]
    with pytest.raises(RequestError, match="10 tokens, and at least 12 are needed"):
        chunks(tokens, 6)
    with pytest.raises(RequestError, match="at least 4 tokens"):
        chunks(tokens, 3)


@pytest.mark.parametrize("first", [1, 2, 30, 31, 59])
def test_log_likelihoods(llm, first):
    tokens = [int(token) for token in np.random.default_rng(first).integers(0, 250, 60)]
    expected = -negative_log_likelihoods(llm, tokens)[first - 1 :]
    actual = llm.log_likelihoods(tokens, first)
    assert actual.dtype == np.float64 and actual.shape == (60 - first,)
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-6)


def test_log_likelihoods_of_the_first_token(llm):
    with pytest.raises(RequestError, match="number 1 or a later one, not 0"):
        llm.log_likelihoods([1, 2, 3], 0)


@pytest.mark.parametrize("context", [32, 33])
def test_the_estimate(llm, context):
    tokens = llm.tokenizer.encode(TEXT)
    scored = []
    for number, (start, estimate) in enumerate(
        zip(range(0, len(tokens) - context + 1, context), estimates(llm, text_chunks(llm, TEXT, context)), strict=True)
    ):
        chunk = [BOS, *tokens[start + 1 : start + context]]
        # The first half is not scored: token i of a chunk is, for context // 2 < i < context.
        scored += negative_log_likelihoods(llm, chunk)[context // 2 :].tolist()
        assert estimate.chunks == number + 1
        assert estimate.tokens == len(scored) == (number + 1) * (context - context // 2 - 1)
        assert estimate.perplexity == pytest.approx(math.exp(np.mean(scored)), rel=1e-6)
        deviation = np.std(scored) / math.sqrt(len(scored) - 1)
        assert estimate.error == pytest.approx(estimate.perplexity * deviation, rel=1e-5)


def test_the_command(capsys, path, llm, tmp_path):
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    arguments = ["perplexity", str(path), "-f", str(tmp_path / "text"), "--device", "cpu", "--precision", "exact"]
    *_, expected = estimates(llm, text_chunks(llm, TEXT, 32)[:3])
    assert cli.main([*arguments, "-c", "32", "--chunks", "3"]) == 0
    captured = capsys.readouterr()
    printed = re.fullmatch(r"Final estimate: PPL = (\d+\.\d{4}) \+/- (\d+\.\d{5})\n", captured.out)
    assert float(printed[1]) == pytest.approx(expected.perplexity, rel=1e-5)
    assert float(printed[2]) == pytest.approx(expected.error, rel=1e-5)
    assert f"[3]{printed[1]}," in captured.err
    assert cli.main([*arguments, "-c", "32", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["chunks"], result["context"], result["tokens"]) == (6, 32, 90)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-f", "{path}"], "is not UTF-8 text"),
        (["-f", "absent.txt"], "absent.txt"),
        (["-f", "{text}"], "at least 1024 are needed, twice the context: .* smaller --context"),
        (["-f", "{text}", "-c", "600"], "--context must be from 1 to the model's 512"),
        (["-f", "{text}", "--chunks", "0"], "--chunks must be at least 1"),
    ],
)
def test_mistakes(capsys, path, tmp_path, arguments, says):
    text = tmp_path / "text"
    text.write_text(TEXT, encoding="utf-8")
    filled = [argument.format(path=path, text=text) for argument in arguments]
    assert cli.main(["perplexity", str(path), *filled, "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("trichord: error: ") and captured.err.count("\n") == 1
    assert re.search(says, captured.err)
