"""The nine-embedding ordinal form: its targets, that it learns, and that no inner product orders as it does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from byline.evaluation.published_ordinal import BINS, PublishedOrdinalHead, fit_published_ordinal, ordinal_loss
from byline.ranker.fit import FitConfig
from byline.ranker.labelled_set import LabelledSet


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def world(seed: int = 0) -> LabelledSet:
    rng = np.random.default_rng(seed)
    item, query = (rng.normal(size=(n, 8)).astype(np.float32) for n in (80, 40))
    return LabelledSet(query, np.arange(80), item, (query[:, :3] @ item[:, :3].T).astype(np.float32))


def test_the_loss_is_least_where_every_border_is_on_the_right_side():
    ranks, totals, mask = torch.arange(50)[None], torch.tensor([50]), torch.ones(1, 50, dtype=torch.bool)
    bins = torch.arange(50) // 5
    right = 20.0 * ((bins[None] > torch.arange(BINS - 1)[:, None]).float() * 2 - 1)[:, None]
    assert float(ordinal_loss(right, ranks, totals, mask)) < 1e-6
    for border in range(BINS - 1):
        wrong = right.clone()
        wrong[border, 0, 0] *= -1
        assert float(ordinal_loss(wrong, ranks, totals, mask)) > 0.3
        mask[0, 0] = False
        assert float(ordinal_loss(wrong, ranks, totals, mask)) < 1e-6
        mask[0, 0] = True


def test_it_learns_and_the_slopes_stay_negative():
    labelled = world()
    fit = FitConfig(max_steps=60, evaluate_every=20, evaluate_at=10)
    found = fit_published_ordinal(labelled, labelled, fit, 0, hidden=(32,), out_dim=8, dropout=0.0)
    assert [step for step, _ in found.history] == [20, 40, 60]
    assert found.best_map == max(value for _, value in found.history) > 0.5
    again = fit_published_ordinal(labelled, labelled, fit, 0, hidden=(32,), out_dim=8, dropout=0.0)
    assert again.history == found.history


def test_raising_every_cosine_of_an_item_raises_its_score():
    labelled = world()
    head = PublishedOrdinalHead(labelled.item_features, labelled.query_features, (16,), 4, 0.0, 8.0)
    queries = head.embed(torch.from_numpy(labelled.query_features[:1]), queries=True)
    near, far = queries, -queries
    both = torch.sigmoid(head.logits(queries, torch.cat([near, far], dim=1))).sum(0)[0]
    assert both[0] < both[1]  # a low predicted rank is influence


def test_its_scores_are_no_inner_products_of_vectors_as_wide_as_its_own():
    labelled = world()
    torch.manual_seed(0)
    head = PublishedOrdinalHead(labelled.item_features, labelled.query_features, (16,), 2, 0.0, 8.0)
    scores = head.scores(labelled.query_features, labelled.item_features).astype(np.float64)
    # Nine embeddings of two dimensions and a constant: an inner product of those would have rank 19 at most.
    assert np.linalg.matrix_rank(scores, tol=1e-5 * np.abs(scores).max()) > 9 * 2 + 1
