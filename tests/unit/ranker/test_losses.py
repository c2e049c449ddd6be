"""Losses: the slope stays positive, more influence means a higher score."""

from __future__ import annotations

import pytest
import torch

from byline.errors import LabelsNotUsable
from byline.ranker.losses import LOSSES, make_loss


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


def test_an_unknown_loss_is_named():
    with pytest.raises(LabelsNotUsable, match="bce_rank, listwise"):
        make_loss("mse")
