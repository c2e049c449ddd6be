"""The published recipe: its labels, its sign, and that it learns what it can."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from byline.evaluation.map import mean_average_precision
from byline.evaluation.published_head import PublishedHead, PublishedSettings, RankedPairs, fit_published
from byline.ranker.labelled_set import LabelledSet


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def world(queries: int = 40, items: int = 60, seed: int = 0) -> LabelledSet:
    rng = np.random.default_rng(seed)
    item = rng.normal(size=(items, 6)).astype(np.float32)
    query = rng.normal(size=(queries, 6)).astype(np.float32)
    return LabelledSet(query, np.arange(items), item, (query[:, :3] @ item[:, :3].T).astype(np.float32))


def test_the_shape_is_the_published_one():
    head = PublishedHead(1280, PublishedSettings())
    assert sum(p.numel() for p in head.parameters()) == 2_755_586
    assert float(head.slope.detach()) == 1.0 and float(head.bias.detach()) == 0.0


def test_labels_are_place_over_count_and_the_most_influential_is_zero():
    labelled = world()
    pairs = RankedPairs(labelled, outsiders=0.1, seed=0)  # every item is ranked: there are no outsiders
    assert len(pairs) == 40 * 60
    best = int(labelled.tau[7].argmax())
    query, item, label = pairs[7 * 60 + best]
    assert label == 0.0
    assert np.array_equal(query.numpy(), labelled.query_features[7])
    assert np.array_equal(item.numpy(), labelled.item_features[best])
    assert sorted(pairs[7 * 60 + n][2] for n in range(60)) == pytest.approx(np.arange(60) / 60)


def test_a_tenth_of_the_pairs_are_outsiders_with_the_last_label():
    labelled = world(items=200)
    labelled.tau[:, 50:] = np.nan
    pairs = RankedPairs(labelled, outsiders=0.1, seed=0)
    assert len(pairs) == 40 * 50
    ranked = {row.tobytes() for row in labelled.item_features[:50]}
    fetched = [pairs[n] for n in range(len(pairs))]
    outside = [label for _, item, label in fetched if item.numpy().tobytes() not in ranked]
    assert 0.07 < len(outside) / len(fetched) < 0.13
    assert set(outside) == {49 / 50}


def test_with_its_sign_kept_it_learns_and_the_slope_stays_negative():
    labelled = world()
    settings = PublishedSettings(slope=-1.0, constrained=True, width=32, batch=256, passes=10, dropout=0.0,
                                 look_every=20)
    fit = fit_published(labelled, labelled, settings, 0, evaluate_at=10)
    assert fit.slope < 0
    assert fit.pairs == 10 * len(RankedPairs(labelled, 0.1, 0)) == fit.looks[-1].pairs
    assert fit.looks[-1].validation_map > fit.looks[0].validation_map + 0.2
    scores = fit.head.scores(labelled.query_features, labelled.item_features)
    assert mean_average_precision(scores, labelled.tau, 10).mean == pytest.approx(fit.looks[-1].validation_map)


def test_a_kept_sign_cannot_turn_and_a_free_one_is_what_was_learned():
    for constrained in (True, False):
        head = PublishedHead(6, PublishedSettings(slope=-1.0, constrained=constrained, width=8))
        optimizer = torch.optim.SGD([head.raw_slope], lr=1.0)
        for _ in range(5):
            optimizer.zero_grad()
            (-head.slope).backward()
            optimizer.step()
        assert (float(head.slope.detach()) < 0) == constrained


def test_the_order_is_by_ascending_logit_whichever_the_sign():
    labelled = world()
    for slope in (1.0, -1.0):
        head = PublishedHead(6, PublishedSettings(slope=slope, width=8, dropout=0.0))
        query = torch.from_numpy(labelled.query_features[:1]).expand(60, -1)
        logits = head(query, torch.from_numpy(labelled.item_features))
        scores = head.scores(labelled.query_features[:1], labelled.item_features)[0]
        assert np.allclose(scores, -logits.detach().numpy(), atol=1e-5)


def test_the_same_seed_gives_the_same_head():
    labelled, settings = world(), PublishedSettings(width=16, batch=512, passes=1)
    one, two = (fit_published(labelled, labelled, settings, 3, evaluate_at=10) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.head.parameters(), two.head.parameters(), strict=True))
