import math

import numpy as np
import pytest
from scipy import stats

from byline.evaluation.agreement import Figure, agreement, decide, overlap, slope, spearman, summarise


def figures(spearman: float, overlap100: float, error: float = 0.01) -> dict[str, Figure]:
    return {"spearman": Figure(spearman, error), "overlap20": Figure(0.5, error),
            "overlap100": Figure(overlap100, error)}  # fmt: skip


def test_spearman_is_scipys_ties_included() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.integers(0, 9, 60), rng.standard_normal(60)
    assert spearman(one, two) == pytest.approx(stats.spearmanr(one, two).statistic)
    assert spearman(two, two**3) == pytest.approx(1)
    assert spearman(two, -two) == pytest.approx(-1)
    assert math.isnan(spearman(np.ones(5), two[:5]))


def test_overlap_counts_the_highest_scores() -> None:
    one = np.array([5.0, 4, 3, 2, 1])
    assert overlap(one, one, 2) == 1
    assert overlap(one, -one, 2) == 0
    assert overlap(one, np.array([5.0, 1, 4, 0, 0]), 2) == 0.5
    assert math.isnan(overlap(one, one, 5)), "all of five in five says nothing"


def test_the_slope_tells_a_unit() -> None:
    one = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    assert slope(one, 3 * one + 7) == pytest.approx(3, rel=1e-5)


def test_a_measure_that_candidates_are_too_few_for_is_left_out_of_the_mean() -> None:
    many, few = np.arange(200.0), np.arange(30.0)
    summary = summarise([agreement(many, many), agreement(few, few)])
    assert summary["overlap100"].mean == 1 and math.isnan(summary["overlap100"].standard_error)
    assert summary["overlap20"] == Figure(1.0, 0.0)


def test_the_standard_error_is_that_of_the_mean_over_queries() -> None:
    assert Figure.of([0.0, 1.0, 2.0]).standard_error == pytest.approx(1 / 3**0.5)


@pytest.mark.parametrize(
    ("gate", "itself", "passed"),
    [
        ((0.95, 0.85), (0.99, 0.99), True),
        ((0.949, 0.9), (0.99, 0.99), False),
        ((0.99, 0.849), (0.99, 0.99), False),
        ((0.78, 0.61), (0.80, 0.60), True),
        ((0.77, 0.61), (0.80, 0.60), False),
        ((0.90, 0.57), (0.80, 0.60), False),
    ],
)
def test_the_gate_is_the_bar_or_the_exact_forms_agreement_with_itself(gate, itself, passed) -> None:
    decision = decide(figures(*gate), figures(*itself))
    assert decision.passed is passed
    assert f"{gate[0]:.4f}" in decision.why


def test_nothing_is_decided_without_overlap_at_100() -> None:
    assert not decide(figures(0.99, math.nan), figures(0.9, 0.9)).passed
