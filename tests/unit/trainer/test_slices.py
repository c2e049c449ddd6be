"""Kinds of queries: what is judged, what is too small, and how sure one must be."""

from __future__ import annotations

import uuid

import numpy as np
import pytest

from byline.catalog.items import Item
from byline.ranker.labelled_set import LabelledSet
from byline.rankings.labelled import LabelSplits
from byline.rankings.store import LabelledQuery
from byline.teachers.racing import student_quantile
from services.trainer.labels import LeftOut, RefreshLabels
from services.trainer.slices import MINIMUM_QUERIES, cuts_of, judge_slices

RNG = np.random.default_rng(0)


def test_a_slice_with_too_few_queries_is_not_judged_and_says_so():
    names = ["many"] * 12 + ["few"] * (MINIMUM_QUERIES - 1)
    active = RNG.uniform(0.2, 0.7, size=len(names))
    many, few = judge_slices({"kind": names}, active - 0.3, active, 0.95)
    assert (many.queries, few.queries) == (12, 7)
    assert many.at_most is not None and many.at_most == pytest.approx(-0.3)
    assert few.at_most is None and few.to_json()["not_judged"] == "fewer than 8 queries"
    assert many.to_json()["not_judged"] is None


def test_the_more_slices_are_looked_at_the_surer_each_must_be():
    active = RNG.uniform(0.2, 0.7, size=40)
    candidate = active + RNG.normal(size=40) * 0.1
    (alone,) = judge_slices({"all": ["one"] * 40}, candidate, active, 0.95)
    among = judge_slices({"all": ["one"] * 40, "halves": ["a", "b"] * 20, "more": ["c"] * 20 + ["d"] * 20},
                         candidate, active, 0.95)  # fmt: skip
    assert len(among) == 5 and among[0].gain == alone.gain
    assert alone.at_most is not None and among[0].at_most is not None and among[0].at_most > alone.at_most


def test_heads_that_are_equally_good_are_refused_for_a_slice_in_hardly_one_of_twenty_comparisons():
    refused = 0
    for _ in range(400):
        difference = RNG.normal(size=80) * 0.1
        cuts = {cut: [str(n) for n in RNG.permutation(80) // 10] for cut in ("a", "b")}
        refused += any(one.at_most is not None and one.at_most < 0
                       for one in judge_slices(cuts, difference, np.zeros(80), 0.95))  # fmt: skip
    assert refused / 400 < 0.08


@pytest.mark.parametrize(("level", "freedom", "expected"), [
    (0.95, 7, 1.895), (0.99, 7, 2.998), (0.995, 10, 3.169), (0.95, 100, 1.660),
])  # fmt: skip
def test_the_quantiles_are_those_of_students_t(level: float, freedom: int, expected: float):
    assert student_quantile(level, freedom) == pytest.approx(expected, rel=0.01)


def _labels(queries: int) -> RefreshLabels:
    """Prompts of two kinds whose texts lie apart; the teacher names an item of ann for one kind and of bob for the
    other. One held-out query has no ranking."""
    kinds = np.arange(queries) % 2
    centres = np.array([[4.0] * 6, [-4.0] * 6])
    rows = (centres[kinds] + RNG.normal(size=(queries, 6))).astype(np.float32)
    items = tuple(Item(number, "x", creator="ann" if number % 2 else "bob") for number in range(10))
    tau = RNG.uniform(size=(queries, 10)).astype(np.float32)
    tau[np.arange(queries), np.where(kinds, 1, 2)] = 2.0
    tau[-1] = np.nan
    whole = LabelledSet(rows, np.arange(10), RNG.normal(size=(10, 6)).astype(np.float32), tau)
    none = np.zeros(0, np.float32)
    prompts = tuple(
        LabelledQuery(uuid.uuid4(), "a red cat" if kind else "blue flag", "train", n, "", np.zeros(0, np.int64), none,
                      none, None, 0, "corpus", 1) for n, kind in enumerate(kinds)
    )  # fmt: skip
    return RefreshLabels(LabelSplits(prompts, (), ()), items, LeftOut({}, {}), whole, whole, whole, prompts, prompts,
                         prompts, None, "test", queries)  # fmt: skip


def test_queries_are_cut_by_prompt_creator_and_distance_and_those_without_a_ranking_left_out():
    blocks = (("efficientnet_lite0", 2), ("minilm", 4))
    cuts = cuts_of(_labels(21), blocks, seed=0)
    assert [len(names) for names in cuts.values()] == [20, 20, 20]
    kinds = np.arange(20) % 2
    for cut in ("prompt", "creator of the teacher's first item"):
        names = np.asarray(cuts[cut])
        assert len(set(names[kinds == 0])) == len(set(names[kinds == 1])) == 1 and len(set(names)) == 2, cut
    assert {name.split()[0] for name in cuts["distance to the training queries"]} <= {"near", "middle", "far"}
    assert "prompt" not in cuts_of(_labels(21), (("efficientnet_lite0", 6),), seed=0)


def test_where_no_slice_could_have_enough_queries_there_are_none():
    assert cuts_of(_labels(MINIMUM_QUERIES), (("minilm", 6),), seed=0) == {}
