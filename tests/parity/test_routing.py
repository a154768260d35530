"""The choice of experts on both backends, against a plain loop in float64 that follows the published rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trichord.cpu_fallback import routing
from trichord.dispatch import operations

BACKENDS = {layout: operations(layout) for layout in ("planes", "blocks")}


@pytest.fixture(params=["planes", "blocks", "blocks without Numba"])
def route(request, monkeypatch):
    if request.param == "blocks without Numba":
        monkeypatch.setattr(routing, "have_numba", lambda: False)
    return BACKENDS[request.param.split()[0]].route


def softmax(numbers):
    exponentials = np.exp(numbers - numbers.max())
    return exponentials / exponentials.sum()


def expected(logits, count, gating, bias, groups, groups_used, normalize, scale):
    """One token: (experts, weights)."""
    logits = logits.astype(np.float64)
    scores = {"softmax": softmax, "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "softmax_of_chosen": np.copy}[gating](
        logits
    )
    ranks = list(scores + (0 if bias is None else bias))
    size = len(ranks) // groups
    if groups > 1:
        sums = [sum(sorted(ranks[group * size : (group + 1) * size])[-2:]) for group in range(groups)]
        used = sorted(range(groups), key=lambda group: -sums[group])[:groups_used]
        ranks = [rank if i // size in used else -np.inf for i, rank in enumerate(ranks)]
    chosen = sorted(range(len(ranks)), key=lambda i: -ranks[i])[:count]
    weights = scores[chosen]
    if gating == "softmax_of_chosen":
        weights = softmax(weights)
    if normalize:
        weights = weights / max(weights.sum(), 2**-14)
    return chosen, weights * scale


@pytest.mark.parametrize(
    ("gating", "biased", "normalize", "scale"),
    [
        ("softmax", False, True, 1.0),
        ("softmax", True, False, 2.5),
        ("sigmoid", True, True, 2.5),
        ("sigmoid", False, False, 1.0),
        ("softmax_of_chosen", False, False, 1.0),
        ("softmax_of_chosen", True, True, 0.5),
    ],
)
@pytest.mark.parametrize(
    ("width", "count", "groups", "groups_used"),
    [
        (1, 1, 1, 1),
        (8, 2, 1, 1),
        (60, 4, 1, 1),
        (512, 32, 1, 1),
        (256, 8, 8, 4),
        (60, 6, 5, 2),
        (16, 4, 8, 2),
        (6, 6, 3, 3),
    ],
)
def test_experts_and_weights(route, width, count, groups, groups_used, gating, biased, normalize, scale):
    generator = np.random.default_rng(width + count)
    logits = 3 * generator.standard_normal((2, width)).astype(np.float32)
    bias = generator.standard_normal(width).astype(np.float32) if biased else None
    experts, weights = route(
        torch.from_numpy(logits),
        count,
        gating,
        None if bias is None else torch.from_numpy(bias),
        groups=groups,
        groups_used=groups_used,
        normalize=normalize,
        scale=scale,
    )
    assert experts.dtype == torch.int32 and weights.dtype == torch.float32
    for token in range(len(logits)):
        chosen, factors = expected(logits[token], count, gating, bias, groups, groups_used, normalize, scale)
        assert experts[token].tolist() == chosen
        np.testing.assert_allclose(weights[token], factors, rtol=1e-5)


def test_of_equal_scores_the_lower_index_is_taken(route):
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 1.0, 1.0], [0.0, -0.0, 0.0, -0.0, 0.0, 0.0]])
    for gating in ("softmax", "sigmoid", "softmax_of_chosen"):
        assert route(logits, 4, gating)[0].tolist() == [[1, 2, 3, 0], [0, 1, 2, 3]]
    assert route(logits, 2, "sigmoid", groups=3, groups_used=1)[0].tolist() == [[2, 3], [0, 1]]


def test_a_tiny_sum_divides_as_a_small_one(route):
    """Far from every expert: the sum of the sigmoids is below float16's smallest normal number, 2^-14."""
    _, weights = route(torch.full((1, 4), -20.0), 2, "sigmoid", normalize=True)
    np.testing.assert_allclose(weights, np.full((1, 2), 2**14 / (1 + np.exp(20.0))), rtol=1e-5)


def test_logits_may_be_strided_rows(route):
    wide = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 20)).astype(np.float32))
    for strided, whole in zip(
        route(wide[:, :8], 3, "softmax"), route(wide[:, :8].contiguous(), 3, "softmax"), strict=True
    ):
        assert torch.equal(strided, whole)


def test_numbers_that_are_not_finite_still_give_experts(route):
    logits = torch.tensor([[float("nan")] * 6, [float("-inf"), 1.0, float("-inf"), 2.0, float("-inf"), 0.0]])
    experts, _ = route(logits, 4, "softmax_of_chosen")
    assert all(len(set(row)) == 4 and set(row) <= set(range(6)) for row in experts.tolist())
    assert experts[1].tolist() == [3, 1, 5, 0]


def test_no_tokens(route):
    experts, weights = route(torch.zeros(0, 8), 2, "softmax")
    assert experts.shape == weights.shape == (0, 2)


@pytest.mark.parametrize(
    ("count", "groups", "groups_used"), [(0, 1, 1), (9, 1, 1), (5, 4, 2), (1, 3, 1), (1, 8, 2), (1, 4, 5)]
)
def test_more_than_there_is(route, count, groups, groups_used):
    with pytest.raises(ValueError, match="experts"):
        route(torch.zeros(2, 8), count, "softmax", groups=groups, groups_used=groups_used)
