"""Kinds of queries: what is judged, what is too small, and how sure one must be."""

from __future__ import annotations

import numpy as np
import pytest

from services.trainer.slices import MINIMUM_QUERIES, judge_slices, student_quantile

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
