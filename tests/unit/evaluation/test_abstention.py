"""The noise floor keeps its promise on nulls it has not seen, and does not refuse real queries without need."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from byline.errors import LabelsNotUsable
from byline.evaluation.abstention import (
    Nulls,
    fit_abstention,
    judge_by_sources,
    report_abstention,
    surely_above,
)
from byline.evaluation.calibration import Calibrator

ENCODER = ("prompt_gain", "ab12")
KINDS = ("photograph", "drawing", "noise")


def nulls(seed: int, per_kind: int = 60, evidence: float | None = -1.0, best: float = 0.0) -> Nulls:
    rng = np.random.default_rng(seed)
    kind = tuple(name for name in KINDS for _ in range(per_kind))
    source = tuple(f"{name} {n // 3}" for name in KINDS for n in range(per_kind))
    m = len(kind)
    return Nulls(kind, source, rng.normal(best, 1, m), None if evidence is None else rng.normal(evidence, 0.2, m))


def real(seed: int, queries: int = 60, evidence: float = 1.0, best: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(best, 1, queries), rng.normal(evidence, 0.2, queries)


def test_where_evidence_tells_them_apart_nobody_is_wronged() -> None:
    fitted = fit_abstention(nulls(0), *real(0), encoder=ENCODER)
    fresh, others = real(1, 500), nulls(1)
    assert fitted.attributes(*fresh).mean() > 0.98
    assert not fitted.attributes(others.best, others.evidence).any()
    assert fitted.evidence is not None and -0.6 < fitted.evidence.limit < 0.6


def test_at_most_the_allowed_share_of_fresh_nulls_passes_even_where_evidence_overlaps() -> None:
    passed = []
    for seed in range(30):
        fitted = fit_abstention(nulls(seed, evidence=0.8), *real(seed), encoder=ENCODER, allowed=0.05)
        fresh = nulls(1000 + seed, evidence=0.8)
        passed.append(fitted.attributes(fresh.best, fresh.evidence).mean())
    assert np.mean(passed) <= 0.05


def test_without_evidence_the_score_alone_keeps_the_promise_and_costs_real_queries() -> None:
    fitted = fit_abstention(nulls(0, evidence=None), real(0)[0], None, encoder=ENCODER, allowed=0.05)
    fresh, best = nulls(1, 300), real(1, 500)[0]
    assert fitted.attributes(fresh.best, None).mean() <= 0.06
    assert 0.1 < fitted.attributes(best, None).mean() < 0.5


def test_of_a_query_without_evidence_nothing_is_said_unless_the_score_is_a_witness_by_itself() -> None:
    weak = fit_abstention(nulls(0), *real(0), encoder=ENCODER)
    assert weak.floor_alone is None and weak.attributes(np.array([-9.0]), None).all()
    assert not weak.attributes(np.array([-9.0]), np.array([5.0])).any()
    calibrator = Calibrator(None, weak)
    assert calibrator.noise_floor(evident=False) is None and calibrator.noise_floor() == weak.floor
    strong = fit_abstention(nulls(0), *real(0, best=4.0), encoder=ENCODER)
    assert strong.floor_alone is not None and strong.floor_alone > strong.floor
    assert strong.attributes(np.array([1.0, 4.0]), None).tolist() == [False, True]


def test_a_null_is_judged_by_floors_that_its_own_source_did_not_fit() -> None:
    base = nulls(0, per_kind=6, evidence=None)
    # One source towers: fitted on itself the floor would lie above it, fitted on the others it passes.
    best = base.best.copy()
    best[0] = best[1] = best[2] = 50.0
    towering = Nulls(base.kind, base.source, best, None)
    passed = judge_by_sources(towering, real(0)[0], None, encoder=ENCODER)
    assert passed[:3].all() and not passed[3:].all()


def test_the_report_holds_every_figure_and_the_unseen_kinds() -> None:
    fitted = fit_abstention(nulls(0), *real(0), encoder=ENCODER)
    report = report_abstention(fitted, nulls(0), real(0), real(1), real(2, evidence=-1.0), encoder=ENCODER)
    assert set(report.false_attribution) == set(report.unseen_kind) == set(KINDS)
    assert report.pooled == 0.0 == report.surely_above and report.nulls == 180
    assert report.refused < 0.05 < report.refused_alone and report.shuffled_passed == 0.0


def test_the_lower_bound_is_clopper_and_pearsons() -> None:
    bound = surely_above(7, 60)
    assert sum(comb(60, k) * bound**k * (1 - bound) ** (60 - k) for k in range(7, 61)) == pytest.approx(0.05, abs=1e-6)
    assert surely_above(0, 60) == 0.0


def test_a_floor_needs_nulls_and_real_queries() -> None:
    empty = Nulls((), (), np.empty(0), np.empty(0))
    with pytest.raises(LabelsNotUsable):
        fit_abstention(empty, *real(0), encoder=ENCODER)
    with pytest.raises(LabelsNotUsable):
        fit_abstention(nulls(0), np.empty(0), np.empty(0), encoder=ENCODER)
