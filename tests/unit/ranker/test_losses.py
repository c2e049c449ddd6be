"""Losses: the slope stays positive, more influence means a higher score, and only counted pairs count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from byline.errors import LabelsNotUsable
from byline.ranker.losses import LOSSES, OrdinalThresholds, influence, make_loss, reliability_weights


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_slope_cannot_become_negative_even_when_the_labels_ask_for_it(name):
    loss = make_loss(name)
    scores = torch.linspace(1.0, -1.0, 50).repeat(4, 1)
    ranks = torch.arange(49, -1, -1).repeat(4, 1)  # the highest score is the least influential
    optimizer = torch.optim.Adam(loss.parameters(), lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        loss(scores, ranks, torch.full((4,), 50), torch.ones(4, 50, dtype=torch.bool)).backward()
        optimizer.step()
    assert 0.0 <= float(loss.slope.detach()) < 0.1


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_gradient_raises_the_score_of_the_most_influential_item(name):
    loss = make_loss(name)
    scores = torch.zeros(1, 20, requires_grad=True)
    loss(scores, torch.arange(20)[None] * 50, torch.tensor([1000]), torch.ones(1, 20, dtype=torch.bool)).backward()
    assert scores.grad is not None
    assert scores.grad[0, 0] < 0 < scores.grad[0, -1]


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_loss_falls_when_the_score_of_an_influential_item_rises(name):
    loss = make_loss(name)
    ranks, totals, mask = torch.arange(30)[None], torch.tensor([30]), torch.ones(1, 30, dtype=torch.bool)
    values = []
    for raised in (-0.4, -0.2, 0.0):
        scores = torch.zeros(1, 30)
        scores[0, 0] = raised
        values.append(float(loss(scores, ranks, totals, mask).detach()))
    assert values == sorted(values, reverse=True) and values[0] > values[-1] + 1e-4


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_masked_pairs_have_no_effect(name):
    loss = make_loss(name)
    scores = torch.randn(3, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[:, 5:] = False
    mask[2] = False
    value = loss(scores, torch.arange(10).repeat(3, 1), torch.full((3,), 10), mask)
    value.backward()
    assert torch.isfinite(value)
    assert scores.grad is not None
    assert (scores.grad[:, 5:] == 0).all() and (scores.grad[2] == 0).all() and (scores.grad[0, :5] != 0).any()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_batch_in_which_nothing_counts_has_a_finite_loss_without_gradient(name):
    scores = torch.randn(2, 5, requires_grad=True)
    value = make_loss(name)(scores, torch.arange(5).repeat(2, 1), torch.full((2,), 5), torch.zeros(2, 5).bool())
    value.backward()
    assert float(value.detach()) == 0.0 and scores.grad is not None and (scores.grad == 0).all()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_equal_weights_change_nothing_and_a_weight_of_zero_takes_a_pair_out(name):
    loss = make_loss(name)
    scores = torch.randn(3, 12, generator=torch.Generator().manual_seed(1), requires_grad=True)
    ranks, totals = torch.arange(12).repeat(3, 1), torch.full((3,), 12)
    mask = torch.ones(3, 12, dtype=torch.bool)
    plain = float(loss(scores, ranks, totals, mask).detach())
    assert float(loss(scores, ranks, totals, mask, torch.full((3, 12), 3.0)).detach()) == pytest.approx(plain, rel=1e-5)
    weights = torch.ones(3, 12)
    weights[:, 0] = 0.0
    loss(scores, ranks, totals, mask, weights).backward()
    assert scores.grad is not None
    # In a softmax a candidate without weight still competes: it is pushed down, never up.
    assert (scores.grad[:, 0] > 0).all() if name == "listwise" else (scores.grad[:, 0] == 0).all()


def test_the_thresholds_stay_ordered_whatever_they_are_asked_for():
    loss = OrdinalThresholds()
    assert loss.thresholds.shape == (10,) and (loss.thresholds.diff() > 0).all()
    scores = torch.linspace(1.0, -1.0, 50).repeat(4, 1)
    ranks = torch.arange(49, -1, -1).repeat(4, 1)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1.0)
    for _ in range(100):
        optimizer.zero_grad()
        loss(scores, ranks, torch.full((4,), 50), torch.ones(4, 50, dtype=torch.bool)).backward()
        optimizer.step()
    assert (loss.thresholds.diff() > 0).all()


def test_thresholds_start_at_what_a_score_that_knows_nothing_would_learn():
    loss = OrdinalThresholds()
    ranks, totals, mask = torch.arange(1000)[None], torch.tensor([1000]), torch.ones(1, 1000, dtype=torch.bool)
    loss(torch.zeros(1, 1000), ranks, totals, mask).backward()
    assert loss.first.grad is not None and float(loss.first.grad.abs().max()) < 1e-3


def test_an_item_beyond_the_ranking_has_no_influence_and_the_first_has_all():
    found = influence(torch.tensor([[0, 5, 10, 12]]), torch.tensor([10]))
    assert found.tolist() == [[1.0, 0.5, 0.0, 0.0]]


def test_uncertain_labels_weigh_less_and_equal_errors_weigh_the_same():
    tau = np.random.default_rng(0).normal(size=(2, 40)).astype(np.float32)
    tau[0, 3] = np.nan
    error = np.full_like(tau, 0.1)
    even = reliability_weights(tau, error)
    assert even[0, 3] == 0.0 and np.allclose(even[1], 1.0, atol=1e-5)
    assert np.allclose(even.sum(1), [39.0, 40.0], atol=1e-3)
    error[1, 7] = 2.0
    uneven = reliability_weights(tau, error)
    assert uneven[1, 7] < 0.3 < uneven[1, 8]


def test_labels_that_are_all_noise_are_weighed_finitely():
    tau = np.random.default_rng(0).normal(size=(1, 40)).astype(np.float32)
    found = reliability_weights(tau, np.full_like(tau, 50.0))
    assert np.isfinite(found).all() and np.allclose(found, 1.0, atol=1e-3)
    assert np.isfinite(reliability_weights(np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32))).all()


def test_a_list_of_a_few_candidates_still_has_a_top():
    """A fixed temperature of 100 ranks told the head that all of 60 candidates matter alike, and it learnt nothing."""
    loss = make_loss("listwise", top=100)
    ranks, mask = torch.arange(60)[None], torch.ones(1, 60, dtype=torch.bool)
    pulls = []
    for total in (60, 6000):
        scores = torch.zeros(1, 60, requires_grad=True)
        loss(scores, ranks, torch.tensor([total]), mask).backward()
        assert scores.grad is not None
        pulls.append(scores.grad[0])
    assert (pulls[0][:8] < 0).all() and (pulls[0][20:] > 0).all()  # the first tenth is pulled up, the rest down
    assert float(pulls[0][0]) < 5 * float(pulls[1][0])


def test_an_unknown_loss_is_named():
    with pytest.raises(LabelsNotUsable, match="bce_rank, listwise, mse, ordinal"):
        make_loss("triplet")
