"""Ranks and dense labels."""

from __future__ import annotations

import numpy as np
import pytest

from byline.errors import LabelsNotUsable
from byline.ranker.labelled_set import LabelledSet, dense_tau, influence_ranks
from byline.ranker.sampling import PairSampler


def test_the_highest_tau_has_rank_zero_and_unscored_items_have_none():
    tau = np.array([[0.1, np.nan, 0.9, 0.1]], dtype=np.float32)
    assert influence_ranks(tau).tolist() == [[1, -1, 0, 2]]


def test_values_land_on_their_items_and_withdrawn_ones_are_left_out():
    ids = np.array([30, 10, 20], dtype=np.int64)
    tau = dense_tau(ids, [np.array([10, 99, 30])], [np.array([1.0, 2.0, 3.0], dtype=np.float32)])
    np.testing.assert_array_equal(tau, [[3.0, 1.0, np.nan]])


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(LabelsNotUsable):
        LabelledSet(np.zeros((2, 3), np.float32), np.arange(4), np.zeros((4, 3), np.float32),
                    np.zeros((2, 5), np.float32))


def test_a_sampler_sees_every_query_once_per_pass_and_repeats_under_its_seed():
    tau = np.random.default_rng(0).normal(size=(10, 40)).astype(np.float32)

    def batches(seed):
        sampler = PairSampler(influence_ranks(tau), queries_per_step=5, items_per_step=16, outside_share=0.1,
                              rng=np.random.default_rng(seed))
        return [sampler.draw() for _ in range(sampler.steps_per_pass)]

    first, again, other = batches(1), batches(1), batches(2)
    assert sorted(np.concatenate([b.queries for b in first])) == list(range(10))
    assert all((a.items == b.items).all() for a, b in zip(first, again, strict=True))
    assert any((a.items != b.items).any() for a, b in zip(first, other, strict=True))
    assert all(len(set(b.items)) == 16 and b.mask.all() for b in first)


def test_unscored_items_take_part_as_not_influential_in_the_share_asked_for():
    tau = np.full((20, 400), np.nan, dtype=np.float32)
    rng = np.random.default_rng(0)
    for row in range(20):
        tau[row, rng.choice(400, 200, replace=False)] = rng.normal(size=200)
    sampler = PairSampler(influence_ranks(tau), queries_per_step=20, items_per_step=400, outside_share=0.1, rng=rng)
    batch = sampler.draw()
    outside = batch.mask & np.isnan(tau[np.ix_(batch.queries, batch.items)])
    assert 0.07 < outside.sum() / batch.mask.sum() < 0.13
    assert (batch.ranks[outside] == 200).all()
