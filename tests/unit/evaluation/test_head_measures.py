"""Measures agree with scikit-learn, and leave out what would mean nothing."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, ndcg_score

from byline.errors import LabelsNotUsable
from byline.evaluation.head_measures import Order, judge_orders, measure, ndcg


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    tau = rng.normal(size=(7, 260)).astype(np.float32)
    scores = (tau + rng.normal(size=tau.shape)).astype(np.float32)
    return scores, tau


@pytest.mark.parametrize("cutoff", [1, 20, 100])
def test_map_is_average_precision_of_scikit_learn(drawn, cutoff: int):
    scores, tau = drawn
    found = measure(scores, tau, [cutoff], [])[f"map_{cutoff}"]
    for row in range(7):
        positive = np.zeros(260, bool)
        positive[np.argsort(-tau[row])[:cutoff]] = True
        assert found[row] == pytest.approx(average_precision_score(positive, scores[row]), abs=1e-12)


def test_ndcg_is_that_of_scikit_learn(drawn):
    scores, tau = drawn
    gains = np.maximum(0.0, 1.0 - np.argsort(np.argsort(-tau, axis=1), axis=1) / 100)
    found = ndcg(scores, tau)
    for row in range(7):
        assert found[row] == pytest.approx(ndcg_score(gains[row : row + 1], scores[row : row + 1]), abs=1e-12)
    assert np.allclose(ndcg(tau, tau), 1.0)


def test_items_the_teacher_did_not_score_take_no_part(drawn):
    scores, tau = (each.copy() for each in drawn)
    tau[:, 200:] = np.nan
    partly = measure(scores, tau, [20], [100])
    whole = measure(scores[:, :200], tau[:, :200], [20], [100])
    assert all(np.array_equal(partly[name], whole[name]) for name in whole)


def test_a_perfect_order_is_perfect_by_every_measure(drawn):
    _, tau = drawn
    assert all(np.allclose(values, 1.0) for values in measure(tau, tau, [20, 100], [100, 200]).values())


def test_top1_asks_where_the_teachers_first_item_is():
    tau = np.arange(20, 0, -1, dtype=np.float32)[None].repeat(3, axis=0)
    scores = tau.copy()
    scores[1, 0] = 15.5  # now sixth
    scores[2, 0] = -1.0  # now last
    found = measure(scores, tau, [5], [])
    assert found["top1_1"].tolist() == [1.0, 0.0, 0.0] and found["top1_10"].tolist() == [1.0, 1.0, 0.0]


def test_orders_are_compared_with_the_first_query_by_query(drawn):
    scores, tau = drawn
    first, same, worse = judge_orders(
        [Order("a", "head", scores), Order("b", "other_head", scores.copy()), Order("c", "raw", -scores)], tau, seed=0,
        cutoffs=(20, 100, 260, 500), shortlists=(100, 300),
    )  # fmt: skip
    assert list(first.values) == ["map_20", "map_100", "recall_100", "top1_1", "top1_10", "ndcg"]
    assert first.gains is None and same.gains is not None and worse.gains is not None
    assert same.gains["map_20"].mean == 0.0 and same.gains["map_20"].p_value > 0.99
    assert worse.gains["ndcg"].mean == pytest.approx(first.mean("ndcg") - worse.mean("ndcg"))
    assert worse.gains["ndcg"].p_value < 0.01 and worse.gains["ndcg"].low > 0
    assert first.standard_error("map_20") == pytest.approx(first.values["map_20"].std() / 7**0.5)


def test_a_query_without_anything_to_order_is_refused(drawn):
    scores, tau = (each.copy() for each in drawn)
    tau[3, 1:] = np.nan
    with pytest.raises(LabelsNotUsable, match="at least two"):
        judge_orders([Order("a", "head", scores)], tau, seed=0)
