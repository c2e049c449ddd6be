"""The gate, with numbers alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from byline.evaluation.abstention import AbstentionReport, surely_above
from byline.evaluation.calibration_report import CalibrationReport, Reliability
from byline.evaluation.map import MapResult
from services.trainer.gate import GateEvidence, GateLimits, judge, score_agreement

LIMITS = GateLimits(map_floor=0.1, tolerance=0.01, confidence=0.95)
RNG = np.random.default_rng(0)
ACTIVE = RNG.uniform(0.2, 0.7, size=40)


def _result(values: np.ndarray) -> MapResult:
    return MapResult(float(values.mean()), float(values.std() / np.sqrt(values.size)), values, 100)


def _evidence(candidate: np.ndarray, **changes) -> GateEvidence:
    return replace(GateEvidence(_result(candidate), _result(ACTIVE), slope=9.0, agreement=0.4), **changes)


def test_a_better_candidate_and_an_equal_one_pass():
    assert judge(_evidence(ACTIVE + 0.02), LIMITS, seed=0).passed
    equal = judge(_evidence(ACTIVE), LIMITS, seed=0)
    assert equal.passed and equal.reasons == () and equal.metrics["gain"] == 0.0


def test_a_first_release_needs_no_predecessor_but_the_floor():
    assert judge(_evidence(ACTIVE, active=None), LIMITS, seed=0).passed
    refused = judge(_evidence(ACTIVE * 0.1, active=None), LIMITS, seed=0)
    assert [reason.partition(":")[0] for reason in refused.reasons] == ["MAP_BELOW_FLOOR"]


def test_a_clearly_worse_candidate_is_refused_even_above_the_floor():
    refused = judge(_evidence(ACTIVE - 0.03), LIMITS, seed=0)
    assert [reason.partition(":")[0] for reason in refused.reasons] == ["REGRESSION"]


def test_a_candidate_that_may_be_much_worse_is_refused_although_its_mean_is_not():
    noisy = ACTIVE + 0.2 * np.where(np.arange(40) % 2, 1, -1)
    assert not judge(_evidence(noisy), LIMITS, seed=0).passed
    assert judge(_evidence(noisy), replace(LIMITS, tolerance=0.2), seed=0).passed


@pytest.mark.parametrize("change", [{"slope": -1.0}, {"slope": 0.0}, {"agreement": -0.2}, {"agreement": float("nan")}])
def test_a_head_of_the_wrong_sign_is_never_published(change):
    refused = judge(_evidence(ACTIVE + 0.1, **change), LIMITS, seed=0)
    assert any(reason.startswith("WRONG_SIGN") for reason in refused.reasons)


def test_a_map_that_is_no_number_is_refused():
    assert not judge(_evidence(np.full(40, np.nan), active=None), LIMITS, seed=0).passed


def test_every_reason_is_given():
    refused = judge(_evidence(ACTIVE * 0.05, slope=-1.0, agreement=-1.0), LIMITS, seed=0)
    assert len(refused.reasons) == 4


def test_agreement_is_the_rank_correlation_over_scored_items():
    tau = np.array([[1.0, 2.0, 3.0, np.nan], [3.0, 2.0, 1.0, 0.0]])
    assert score_agreement(np.array([[1.0, 5.0, 9.0, 100.0], [9.0, 5.0, 1.0, -3.0]]), tau) == pytest.approx(1.0)
    assert score_agreement(-np.array([[1.0, 5.0, 9.0, 100.0], [9.0, 5.0, 1.0, -3.0]]), tau) == pytest.approx(-1.0)


def _calibration(error: float, luck: float = 0.03) -> CalibrationReport:
    part = Reliability(error, luck, (0.5,), (0.5,), 100, 20)
    return CalibrationReport(100, part, part, Reliability(0.001, 0.002, (0.1,), (0.1,), 1000, 20), 0.9, 0.88, 0.4)


def _abstention(passed: int, nulls: int = 160) -> AbstentionReport:
    share = passed / nulls
    return AbstentionReport({"drawing": share}, share, surely_above(passed, nulls), nulls, {}, 0.0, 0.02, 0.6, 68, 0.0)


def test_probabilities_that_are_off_by_more_than_allowed_and_more_than_luck_refuse_a_release():
    fine = judge(_evidence(ACTIVE, calibration=_calibration(0.049)), LIMITS, seed=0)
    assert fine.passed and fine.metrics["calibration_error"] == 0.049 and fine.metrics["interval_coverage"] == 0.88
    assert judge(_evidence(ACTIVE, calibration=_calibration(0.08, luck=0.09)), LIMITS, seed=0).passed
    refused = judge(_evidence(ACTIVE, calibration=_calibration(0.08)), LIMITS, seed=0)
    assert [reason.partition(":")[0] for reason in refused.reasons] == ["CALIBRATION_ERROR"]
    assert judge(_evidence(ACTIVE, calibration=_calibration(0.08)), replace(LIMITS, calibration_error=0.1), 0).passed


def test_a_release_that_surely_attributes_too_many_null_queries_is_refused():
    for passed in (0, 8, 12):
        assert judge(_evidence(ACTIVE, abstention=_abstention(passed)), LIMITS, seed=0).passed
    refused = judge(_evidence(ACTIVE, abstention=_abstention(20)), LIMITS, seed=0)
    assert [reason.partition(":")[0] for reason in refused.reasons] == ["FALSE_ATTRIBUTION"]
    assert refused.metrics["false_attribution"] == 0.125 and refused.metrics["real_queries_refused"] == 0.02


def test_what_could_not_be_measured_is_no_reason_and_no_figure():
    decision = judge(_evidence(ACTIVE), LIMITS, seed=0)
    assert decision.passed and not {"calibration_error", "false_attribution"} & decision.metrics.keys()


def test_a_candidate_that_is_surely_worse_at_one_kind_of_query_is_refused_although_its_mean_rises():
    kinds = {"prompt": ["cats"] * 10 + ["dogs"] * 30}
    change = np.where(np.arange(40) < 10, -0.1, 0.1) + RNG.normal(size=40) * 0.01
    refused = judge(_evidence(ACTIVE + change, slices=kinds), LIMITS, seed=0)
    assert [reason.partition(":")[0] for reason in refused.reasons] == ["SLICE_REGRESSION"]
    assert "10 queries of prompt = cats" in refused.reasons[0]
    assert (refused.metrics["slices_judged"], refused.metrics["slices_too_small"]) == (2.0, 0.0)
    assert judge(_evidence(ACTIVE + change, slices=kinds), replace(LIMITS, slice_tolerance=0.2), seed=0).passed
    assert [one.name for one in refused.slices] == ["cats", "dogs"]


def test_a_kind_of_query_that_may_only_be_worse_refuses_nothing():
    kinds = {"prompt": ["cats"] * 10 + ["dogs"] * 30}
    change = np.where(np.arange(40) < 10, RNG.normal(size=40) * 0.2 - 0.04, 0.1)
    assert judge(_evidence(ACTIVE + change, slices=kinds), LIMITS, seed=0).passed


def test_without_an_active_head_or_slices_there_is_nothing_to_compare():
    kinds = {"prompt": ["cats"] * 40}
    assert judge(_evidence(ACTIVE, active=None, slices=kinds), LIMITS, seed=0).slices == ()
    assert "slices_judged" not in judge(_evidence(ACTIVE), LIMITS, seed=0).metrics
