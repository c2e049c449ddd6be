"""mAP(L) against scikit-learn, and its edges."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from byline.errors import LabelsNotUsable
from byline.evaluation.map import average_precision, mean_average_precision
from byline.evaluation.recall import recall_at


@pytest.mark.parametrize(("n", "cutoff"), [(50, 1), (500, 20), (2509, 100)])
def test_map_equals_scikit_learn_on_strict_orders(n, cutoff):
    rng = np.random.default_rng(n)
    tau = rng.normal(size=(6, n)).astype(np.float32)
    scores = (tau + rng.normal(size=(6, n))).astype(np.float32)
    expected = []
    for row in range(6):
        positive = np.zeros(n, dtype=bool)
        positive[np.argsort(-tau[row], kind="stable")[:cutoff]] = True
        order = np.argsort(-scores[row], kind="stable")
        pseudo = np.empty(n)
        pseudo[order] = 1.0 / (np.arange(n) + 1.0)
        expected.append(average_precision_score(positive, pseudo))
        assert average_precision(order, np.flatnonzero(positive)) == pytest.approx(expected[-1], abs=1e-12)
    result = mean_average_precision(scores, tau, cutoff)
    np.testing.assert_allclose(result.per_query, expected, atol=1e-12)
    assert result.mean == pytest.approx(np.mean(expected))
    assert result.standard_error == pytest.approx(np.std(expected) / np.sqrt(6))


def test_a_perfect_prediction_scores_one_and_a_random_one_about_the_share_of_positives():
    rng = np.random.default_rng(0)
    tau = rng.normal(size=(40, 1000)).astype(np.float32)
    assert mean_average_precision(tau, tau, 100).mean == 1.0
    chance = mean_average_precision(rng.normal(size=tau.shape).astype(np.float32), tau, 100).mean
    assert 0.09 < chance < 0.13


def test_items_the_teacher_did_not_score_take_no_part():
    rng = np.random.default_rng(0)
    tau = rng.normal(size=(5, 200)).astype(np.float32)
    scores = rng.normal(size=(5, 200)).astype(np.float32)
    padded_tau = np.concatenate([tau, np.full((5, 30), np.nan, np.float32)], axis=1)
    padded_scores = np.concatenate([scores, np.full((5, 30), 9.0, np.float32)], axis=1)
    np.testing.assert_array_equal(mean_average_precision(padded_scores, padded_tau, 20).per_query,
                                  mean_average_precision(scores, tau, 20).per_query)


def test_predictions_that_cannot_be_judged_are_refused():
    tau = np.ones((2, 3), dtype=np.float32)
    with pytest.raises(LabelsNotUsable):
        mean_average_precision(np.ones((2, 4), np.float32), tau, 1)
    with pytest.raises(LabelsNotUsable):
        mean_average_precision(np.full((2, 3), np.nan, np.float32), tau, 1)
    with pytest.raises(LabelsNotUsable):
        mean_average_precision(tau, np.full((2, 3), np.nan, np.float32), 1)
    with pytest.raises(LabelsNotUsable):
        average_precision(np.array([0, 1]), np.array([5]))


def test_recall_counts_the_teachers_top_within_the_shortlist():
    tau = np.array([[4.0, 3.0, 2.0, 1.0]], dtype=np.float32)
    scores = np.array([[1.0, 4.0, 3.0, 2.0]], dtype=np.float32)
    assert recall_at(scores, tau, 2, 2).tolist() == [0.5]
    assert recall_at(scores, tau, 2, 4).tolist() == [1.0]
    assert np.isnan(recall_at(scores, np.full_like(tau, np.nan), 2, 4)).all()
