"""Sampling against hand-worked cases and against NumPy's own sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from host_reads import READS, Calls

from trichord.completion_text import CompletionText
from trichord.errors import ModelError, RequestError
from trichord.sampling import report_logprobs, sample
from trichord.sampling_params import SamplingParams
from trichord.sequence import Sequence


def sequence(prompt=(0,), completion=(), index=0, **params) -> Sequence:
    s = Sequence(list(prompt), SamplingParams(**params), CompletionText(None, ()), frozenset(), limit=1000, index=index)
    s.tokens += completion
    return s


def logits(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float32).log()[None]


def frequencies(probabilities, draws=4000, **params) -> np.ndarray:
    """How often each token is drawn over many positions of one seed."""
    sequences = [sequence(completion=[0] * i, seed=11, **params) for i in range(draws)]
    tokens = sample(logits(*probabilities).repeat(draws, 1), sequences)
    return np.bincount(tokens, minlength=len(probabilities)) / draws


def test_temperature_zero_takes_the_likeliest():
    assert sample(torch.tensor([[0.0, 3.0, 2.0], [5.0, 3.0, 2.0]]), [sequence(temperature=0)] * 2) == [1, 0]


def test_draws_follow_the_probabilities():
    assert frequencies([0.1, 0.2, 0.3, 0.4]) == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.03)


def test_temperature_sharpens():
    expected = np.array([0.2, 0.8]) ** 2
    assert frequencies([0.2, 0.8], temperature=0.5) == pytest.approx(expected / expected.sum(), abs=0.03)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, [2, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.65}, [2, 3]),
        ({"top_p": 0.71}, [1, 2, 3]),
        ({"top_p": 0.01}, [3]),
        ({"min_p": 0.6}, [2, 3]),
        ({"min_p": 1.0}, [3]),
        ({"top_k": 3, "top_p": 0.75}, [2, 3]),  # of the three's mass 0.9, the two likeliest hold 0.78
        ({"logit_bias": {3: -math.inf}}, [0, 1, 2]),
    ],
)
def test_truncation_keeps_the_right_tokens_in_proportion(params, kept):
    probabilities = np.array([0.1, 0.2, 0.3, 0.4])
    expected = np.where(np.isin(range(4), kept), probabilities, 0)
    assert frequencies(probabilities, **params) == pytest.approx(expected / expected.sum(), abs=0.03)


def test_top_p_over_a_flat_large_vocabulary_needs_more_than_the_first_candidates():
    vocabulary = 5000
    rows = torch.zeros(300, vocabulary)
    rows[:, ::2] = 1.0
    tokens = sample(rows, [sequence(completion=[0] * i, top_p=0.7, seed=5) for i in range(300)])
    assert all(token % 2 == 0 for token in tokens)  # the even half holds e / (e + 1) = 0.73
    assert len(set(tokens)) > 250


def test_penalties_by_hand():
    row = torch.tensor([[2.0, 1.9, -1.0, -1.9]])
    # Divided by 2, token 0 falls to 1.0; token 2 is multiplied to -2.0 and falls below token 3.
    assert sample(row.clone(), [sequence(prompt=[0], temperature=0, repetition_penalty=2.0)]) == [1]
    low = torch.tensor([[-9.0, -9.0, -1.0, -1.9]])
    assert sample(low, [sequence(prompt=[2], temperature=0, repetition_penalty=2.0)]) == [3]
    assert sample(row.clone(), [sequence(prompt=[0], temperature=0, presence_penalty=2.0)]) == [
        0
    ]  # the prompt is exempt
    assert sample(row.clone(), [sequence(completion=[0], temperature=0, presence_penalty=0.2)]) == [1]
    assert sample(row.clone(), [sequence(completion=[0], temperature=0, frequency_penalty=0.06)]) == [0]
    assert sample(row.clone(), [sequence(completion=[0, 0], temperature=0, frequency_penalty=0.06)]) == [1]
    assert sample(row.clone(), [sequence(temperature=0, logit_bias={3: 5.0})]) == [3]


def test_draws_depend_on_seed_completion_and_position_alone():
    row = torch.randn(1, 500, generator=torch.Generator().manual_seed(3))
    others = torch.randn(3, 500, generator=torch.Generator().manual_seed(4))
    alone = sample(row.clone(), [sequence(seed=9, completion=[1, 2])])
    batched = sample(torch.cat([others, row]), [sequence(seed=1, top_k=5)] * 3 + [sequence(seed=9, completion=[5, 6])])
    assert batched[-1:] == alone
    varied = [sequence(seed=s, index=i, completion=[1] * n) for s in (1, 2) for i in (0, 1) for n in (0, 1)]
    assert len(set(sample(row.repeat(8, 1), varied))) > 4


def test_damaged_logits_are_an_error():
    for bad in (math.nan, math.inf):
        with pytest.raises(ModelError, match="not finite"):
            sample(torch.tensor([[0.0, bad]]), [sequence()])
    with pytest.raises(ModelError, match="not finite"):
        sample(torch.full((1, 3), -math.inf), [sequence()])


def test_logprobs_are_the_log_softmax_with_ranks():
    row = np.array([0.5, 2.0, -1.0, 1.0])
    expected = row - np.log(np.exp(row).sum())
    (entries,) = report_logprobs(torch.tensor(row)[None], [2], 2, "<{}>".format)
    assert list(entries) == [2, 1, 3]
    assert [entry.rank for entry in entries.values()] == [4, 1, 2]
    assert [entry.logprob for entry in entries.values()] == pytest.approx(expected[[2, 1, 3]], abs=1e-6)
    assert entries[3].text == "<3>"


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": "hot"}, {"top_p": 0.0}, {"top_p": 1.1},
        {"top_k": -2}, {"top_k": 1.5}, {"min_p": -0.1}, {"min_p": 2}, {"repetition_penalty": 0}, {"max_tokens": 0},
        {"max_tokens": -5}, {"max_tokens": True}, {"n": 0}, {"seed": -1}, {"logprobs": -1}, {"stop": [""]},
        {"stop": [3]}, {"stop_token_ids": [-1]}, {"logit_bias": {-1: 1.0}}, {"logit_bias": {1: math.nan}},
        {"presence_penalty": 2.1}, {"frequency_penalty": -2.1}, {"temperature": math.inf},
    ],
)  # fmt: skip
def test_impossible_parameters_are_refused_by_name(params):
    with pytest.raises(RequestError, match=next(iter(params))):
        SamplingParams(**params)


EVERYTHING = {
    "temperature": 0.7,
    "top_k": 30,
    "top_p": 0.9,
    "min_p": 0.01,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.1,
    "logit_bias": {3: 1.0},
}


def test_nothing_waits_for_the_device_before_the_tokens_are_read():
    rows = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0))
    sequences = [sequence(temperature=0), sequence(completion=[1, 1, 5], seed=1, **EVERYTHING), sequence(seed=2)]
    with Calls(*READS) as calls:
        sample(rows, sequences)
    assert not calls.made


def test_a_row_draws_the_same_beside_others():
    rows = torch.randn(4, 3000, generator=torch.Generator().manual_seed(1))
    sequences = [
        sequence(temperature=0, repetition_penalty=1.5),
        sequence(completion=[4, 4, 9], seed=1, **EVERYTHING),
        sequence(seed=2, top_p=0.97, temperature=5.0),  # flat: the first candidates hold too little
        sequence(seed=3, top_p=0.3, logit_bias={7: 30.0}),
    ]
    alone = [sample(rows[i : i + 1].clone(), sequences[i : i + 1])[0] for i in range(4)]
    assert sample(rows.clone(), sequences) == alone
    assert alone[3] == 7


def test_penalties_touch_only_their_own_rows():
    rows = torch.tensor([[2.0, 1.9]]).repeat(3, 1)
    sequences = [sequence(temperature=0), sequence(temperature=0, repetition_penalty=2.0), sequence(temperature=0)]
    assert sample(rows, sequences) == [0, 1, 0]
    assert rows.tolist() == pytest.approx(np.array([[2.0, 1.9], [1.0, 1.9], [2.0, 1.9]], np.float32))
