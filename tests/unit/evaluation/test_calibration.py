"""From scores to probabilities: honest on queries that were not fitted on, and readable in every format."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from byline.errors import LabelsNotUsable, ReleaseCorrupt
from byline.evaluation.calibrate import ScoredNulls, ScoredQueries, fit_calibrator
from byline.evaluation.calibration import Abstention, Calibrator, Evidence
from byline.evaluation.calibration_fit import fit_curve, margins_of, positives, query_shares
from byline.evaluation.calibration_report import expected_calibration_error, reliability, report_calibration

TOP = 20


def world(queries: int, seed: int, items: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Scores and τ whose agreement is the same for every query, at levels and of scales of each query's own."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(queries, items))
    seen = truth + 0.7 * rng.normal(size=truth.shape)
    level, scale = 3 * rng.normal(size=(queries, 1)), np.exp(rng.normal(size=(queries, 1)))
    return (level + scale * seen).astype(np.float32), truth.astype(np.float32)


def first_format(**changes: Any) -> dict[str, Any]:
    return {"cosine": [0.0, 0.5, 1.0], "probability": [0.1, 0.4, 0.9], "low": [0.0, 0.3, 0.8], "high": [0.2, 0.5, 1.0],
            "noise_floor": 0.25, **changes}


def test_held_out_queries_are_calibrated_although_their_scores_have_different_levels_and_scales() -> None:
    curve = fit_curve(*world(200, 0), top=TOP)
    report = report_calibration(curve, *world(400, 1), top=TOP, seed=0)
    assert report is not None
    assert report.retrieved.error < 0.03 and report.everything.error < 0.01 and report.shown.error < 0.03
    # It matters: the same queries by their bare scores are far off.
    scores, tau = world(80, 1)
    wanted = positives(tau, TOP).ravel().astype(float)
    from sklearn.isotonic import IsotonicRegression

    fit_scores, fit_tau = world(60, 0)
    bare = IsotonicRegression(out_of_bounds="clip").fit(fit_scores.ravel(), positives(fit_tau, TOP).ravel())
    first = np.argsort(-scores, axis=1)[:, :TOP]
    stated = np.take_along_axis(bare.predict(scores.ravel()).reshape(scores.shape), first, 1).ravel()
    assert expected_calibration_error(stated, np.take_along_axis(wanted.reshape(tau.shape), first, 1).ravel()) > 0.1


def test_a_new_querys_share_lies_in_the_interval_as_often_as_stated() -> None:
    """Over many fits: the guarantee is on average over calibration sets too."""
    held = []
    for seed in range(25):
        curve = fit_curve(*world(29, 2 * seed, items=120), top=TOP, coverage=0.8)
        scores, tau = world(30, 2 * seed + 1, items=120)
        shares = query_shares(margins_of(scores, TOP), positives(tau, TOP), ~np.isnan(tau), curve.edges)
        known = ~np.isnan(shares)
        held.append(((shares >= curve.low[:, None] - 1e-9) & (shares <= curve.high[:, None] + 1e-9))[known].mean())
    assert 0.79 <= float(np.mean(held)) <= 0.93


def test_too_few_queries_give_the_whole_interval_and_none_an_error() -> None:
    curve = fit_curve(*world(5, 0), top=TOP, coverage=0.9)
    assert curve.low.tolist() == [0.0] * len(curve.low) and curve.high.tolist() == [1.0] * len(curve.high)
    scores, tau = world(5, 0, items=TOP)
    with pytest.raises(LabelsNotUsable, match="40 scored items"):
        fit_curve(scores, tau, top=TOP)


def test_items_that_were_not_scored_neither_fit_nor_judge() -> None:
    scores, tau = world(40, 3)
    scores[:, 250:], tau[:, 250:] = scores[:, 250:] - 1e3, np.nan
    whole, part = fit_curve(scores, tau, top=TOP), fit_curve(scores[:, :250], tau[:, :250], top=TOP)
    np.testing.assert_allclose(whole.probability, part.probability)
    np.testing.assert_allclose(whole.margin, part.margin, atol=1e-4)


def test_calibration_error_is_that_of_the_definition() -> None:
    stated, found = np.array([0.1, 0.1, 0.9, 0.9]), np.array([0.0, 0.0, 1.0, 0.0])
    assert expected_calibration_error(stated, found, bins=2) == pytest.approx(0.5 * 0.1 + 0.5 * 0.4)


def test_luck_covers_the_error_of_true_probabilities_and_not_of_wrong_ones() -> None:
    rng = np.random.default_rng(0)
    query = np.repeat(np.arange(60), 20)
    covered = []
    for _ in range(40):
        true = rng.uniform(0, 1, 60 * 20)
        found = (rng.random(true.shape) < true).astype(float)
        fair, wrong = reliability(true, found, query, 0), reliability(true**2, found, query, 0)
        assert wrong.error > wrong.luck > 0
        covered.append(fair.error <= fair.luck)
    assert 0.85 <= np.mean(covered) < 1.0


def test_probability_falls_with_the_rank_lies_in_its_interval_and_needs_the_reference_rank() -> None:
    scores, tau = world(60, 0)
    calibrator = fit_calibrator(ScoredQueries(scores, tau), None, None, top=TOP, seed=0).calibrator
    ordered = np.sort(scores[0])[::-1].tolist()
    found = calibrator.probabilities(ordered[:50])
    values = [one.value for one in found if one is not None]
    assert calibrator.depth == TOP and len(values) == 50 and values == sorted(values, reverse=True)
    assert all(one is not None and 0 <= one.low <= one.value <= one.high <= 1 for one in found)
    assert calibrator.probabilities(ordered[:TOP]) == found[:TOP]
    shifted = calibrator.probabilities([score + 5 for score in ordered[:50]])
    np.testing.assert_allclose([one[:3] for one in shifted if one], [one[:3] for one in found if one], atol=1e-6)


@pytest.mark.parametrize("of", ["the head", "each query"])
def test_the_scale_of_scores_changes_no_probability_and_no_figure(of: str) -> None:
    """A head's inner products may be of any size, and so may the vector of one query."""
    rng = np.random.default_rng(7)

    def rescaled(scores: np.ndarray) -> np.ndarray:
        factor = 1000.0 if of == "the head" else np.exp(2 * rng.normal(size=(len(scores), 1)))
        return (scores * factor).astype(np.float32)

    (scores, tau), (fresh, fresh_tau) = world(60, 0), world(40, 1)
    plain = fit_calibrator(ScoredQueries(scores, tau), ScoredQueries(fresh, fresh_tau), None, top=TOP, seed=0)
    other = fit_calibrator(ScoredQueries(rescaled(scores), tau), ScoredQueries(rescaled(fresh), fresh_tau), None,
                           top=TOP, seed=0)
    for row in range(5):
        first, second = (np.asarray([one[:3] for one in found.calibrator.probabilities(np.sort(values[row])[::-1][:60])
                                     if one])
                         for found, values in ((plain, fresh), (other, rescaled(fresh))))
        assert np.ptp(first[:, 0]) > 0.3
        np.testing.assert_allclose(second, first, atol=2e-3)
    assert plain.curve is not None and other.curve is not None
    assert other.curve.retrieved.error == pytest.approx(plain.curve.retrieved.error, abs=2e-3)
    assert other.curve.coverage == pytest.approx(plain.curve.coverage, abs=0.01)


def test_a_heads_scale_moves_its_floors_with_it_and_no_verdict() -> None:
    rng = np.random.default_rng(0)
    kinds = ("drawing", "photograph")
    kind = tuple(name for name in kinds for _ in range(40))
    best, evidence = rng.normal(0, 1, 80), rng.normal(0.8, 0.5, 80)
    scores, tau = world(40, 0)
    real = rng.normal(1.0, 0.5, 40).astype(np.float32)
    verdicts = []
    for factor in (1.0, 1000.0):
        nulls = ScoredNulls(kind, tuple(f"{n}" for n in range(80)), factor * best, evidence)
        found = fit_calibrator(ScoredQueries((factor * scores).astype(np.float32), tau, real), None, nulls, top=TOP,
                               seed=0, encoder=("prompt_gain", "ab"))
        assert found.abstention is not None
        verdicts.append([found.calibrator.attributes([factor * value], known)
                         for value in np.linspace(-2, 4, 30) for known in (0.2, 1.0, None)])
    assert verdicts[0] == verdicts[1] and len(set(verdicts[0])) == 2


def test_scores_that_are_all_equal_say_nothing_and_break_nothing() -> None:
    calibrator = fit_calibrator(ScoredQueries(*world(60, 0)), None, None, top=TOP, seed=0).calibrator
    for count in (1, 3, 50):
        found = calibrator.probabilities([0.1] * count)
        assert len(set(found)) == 1 and found[0] is not None and np.isfinite(found[0][:3]).all()


def test_what_is_written_is_read_again() -> None:
    scores, tau = world(60, 0)
    curve = fit_calibrator(ScoredQueries(scores, tau), None, None, top=TOP, seed=0).calibrator.curve
    written = Calibrator(curve, Abstention(0.1, 0.4, Evidence("prompt_gain", "ab", 0.2)), TOP)
    read = Calibrator.from_json(json.loads(json.dumps(written.to_json(), allow_nan=False)))
    assert read.to_json() == written.to_json() and read.abstention == written.abstention
    silent = Calibrator(None, Abstention(0.1, None, Evidence("prompt_gain", "ab", 0.2)))
    assert Calibrator.from_json(json.loads(json.dumps(silent.to_json()))) == silent
    assert read.probabilities([1.0, 0.5]) == written.probabilities([1.0, 0.5])
    empty = Calibrator.from_json(Calibrator().to_json())
    assert empty.curve is None and empty.abstention is None and empty.depth == 0


def test_releases_of_the_first_format_and_without_calibration_are_still_read() -> None:
    old = Calibrator.from_json(first_format())
    values = [old.probabilities([score])[0] for score in (-1.0, 0.0, 0.25, 0.5, 0.9, 2.0)]
    assert [one.value for one in values if one] == sorted(one.value for one in values if one)
    assert not old.attributes([0.2, 0.1]) and old.attributes([0.3, 0.1]) and old.noise_floor() == 0.25
    for without in ({}, {"kind": "none"}, {"cosine": [0.0, 1.0]}, first_format(low=[0.1])):
        assert Calibrator.from_json(without).probabilities([0.5]) == [None]
    assert Calibrator.from_json({}).attributes([-0.9]) and not Calibrator.from_json({}).attributes([])


@pytest.mark.parametrize("fault", [
    {"format": 3}, {"format": 2}, {"format": 2, "kind": "isotonic_margin", "abstention": None},
    {"format": 2, "kind": "isotonic_margin", "abstention": None, "reference_rank": 1, "coverage": 0.9,
     "curve": {"margin": [0.0], "probability": [0.5]}, "interval": {"edge": [0.0], "low": [0.0], "high": [1.0]}},
])  # fmt: skip
def test_a_calibrator_of_the_future_or_one_that_does_not_fit_is_refused(fault: dict[str, Any]) -> None:
    with pytest.raises(ReleaseCorrupt, match=r"calibrator\.json"):
        Calibrator.from_json(fault)


def test_too_few_validation_queries_promise_nothing_and_say_why() -> None:
    nulls = ScoredNulls(("drawing",) * 4, ("a", "b", "c", "d"), np.zeros(4), np.zeros(4))
    found = fit_calibrator(ScoredQueries(*world(5, 0)), None, nulls, top=TOP, seed=0)
    assert found.calibrator.curve is None and found.calibrator.abstention is None
    assert len(found.why_not) == 3 and "5 validation queries" in found.why_not[0]
