"""Baselines that a head must beat."""

from __future__ import annotations

import numpy as np

from byline.evaluation.baselines import (
    combined_raw_scores,
    global_mean_rank_scores,
    prompt_neighbour_scores,
    raw_feature_scores,
)
from byline.evaluation.map import mean_average_precision
from byline.ranker.labelled_set import LabelledSet


def _labelled(tau: np.ndarray) -> LabelledSet:
    q, n = tau.shape
    return LabelledSet(np.zeros((q, 2), np.float32), np.arange(n), np.zeros((n, 2), np.float32), tau.astype(np.float32))


def test_the_global_baseline_finds_what_influences_everything():
    rng = np.random.default_rng(0)
    common = rng.normal(size=100)
    tau = common + 0.1 * rng.normal(size=(20, 100))
    scores = global_mean_rank_scores(_labelled(tau), 3)
    assert scores.shape == (3, 100) and (scores[0] == scores[2]).all()
    assert mean_average_precision(scores, np.tile(common.astype(np.float32), (3, 1)), 10).mean > 0.9


def test_the_prompt_baseline_is_the_mean_rank_per_prompt_when_prompts_repeat():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(2, 60))
    text = np.eye(2, 8, dtype=np.float32)
    rows = np.array([0, 1] * 6)
    labelled = _labelled(truth[rows] + 0.1 * rng.normal(size=(12, 60)))
    scores = prompt_neighbour_scores(labelled, text[rows], text)
    assert mean_average_precision(scores, truth.astype(np.float32), 10).mean > 0.9
    assert mean_average_precision(scores[::-1], truth.astype(np.float32), 10).mean < 0.5


def test_raw_scores_are_cosines_of_standardised_features():
    rng = np.random.default_rng(0)
    items = (rng.normal(size=(50, 6)) * [1, 10, 100, 1, 1, 0] + 3).astype(np.float32)
    scores = raw_feature_scores(items[:5], items)
    assert (scores.argmax(1) == np.arange(5)).all()
    np.testing.assert_allclose(scores[np.arange(5), np.arange(5)], 1.0, atol=1e-5)
    np.testing.assert_allclose(combined_raw_scores([scores, scores]), scores, atol=1e-6)
    shifted = raw_feature_scores(items[:5] + 7, items, query_mean=items.mean(0) + 7)
    np.testing.assert_allclose(shifted, scores, atol=1e-4)
