"""May this candidate become the active release? A pure function of what was measured.

Why it exists: automatic publication is only tolerable if its rule is written in one place, can be tested with
numbers alone, and gives its reasons. The candidate must not be worse than the active release by more than a
tolerance (lower bound of a paired bootstrap over held-out queries), nor surely worse at one kind of query, must clear
an absolute floor, and must have the sign the whole project relies on: higher score = more influential.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from byline.evaluation.abstention import AbstentionReport
from byline.evaluation.bootstrap import paired_bootstrap
from byline.evaluation.calibration_report import CalibrationReport
from byline.evaluation.map import MapResult
from services.trainer.slices import Cuts, SliceVerdict, judge_slices


@dataclass(frozen=True)
class GateLimits:
    """``map_floor`` absolute; ``tolerance`` how much worse than the active release may be, at ``confidence``.

    ``slice_tolerance``: how much worse on one kind of query; only a slice that is surely worse refuses.
    ``calibration_error`` over each query's first L retrieved items, ``false_attribution`` of null queries (both at
    most). They refuse a candidate only where luck does not explain the figure: see :func:`judge`.
    """

    map_floor: float
    tolerance: float
    confidence: float
    calibration_error: float = 0.05
    false_attribution: float = 0.05
    slice_tolerance: float = 0.02


@dataclass(frozen=True)
class GateEvidence:
    """What was measured on the same held-out queries.

    ``active`` is None for a first release, or when the active one cannot be compared (other features). ``agreement``
    is the mean correlation of predicted scores with τ; ``slope`` the loss's learned factor on the score.
    ``slices`` name the kind of each of these queries, by cut; empty: no slice is judged.
    """

    candidate: MapResult
    active: MapResult | None
    slope: float
    agreement: float
    #: None where too few queries, or no null queries, were there to measure it.
    calibration: CalibrationReport | None = None
    abstention: AbstentionReport | None = None
    slices: Cuts = field(default_factory=dict)


@dataclass(frozen=True)
class GateDecision:
    """``reasons`` is empty exactly if the candidate passed; ``metrics`` and ``slices`` go into the release's record."""

    passed: bool
    reasons: tuple[str, ...]
    metrics: dict[str, float]
    slices: tuple[SliceVerdict, ...] = ()


def judge(evidence: GateEvidence, limits: GateLimits, seed: int) -> GateDecision:
    """Decide, giving every reason against and not only the first."""
    reasons: list[str] = []
    candidate = evidence.candidate
    metrics = {"map": candidate.mean, "map_standard_error": candidate.standard_error, "slope": evidence.slope,
               "agreement": evidence.agreement, "held_out_queries": float(candidate.per_query.shape[0])}
    if not np.isfinite(candidate.mean) or candidate.mean < limits.map_floor:
        reasons.append(f"MAP_BELOW_FLOOR: held-out mAP({candidate.cutoff}) is {candidate.mean:.3f}, "
                       f"the floor is {limits.map_floor:.3f}")
    if not evidence.slope > 0:
        reasons.append(f"WRONG_SIGN: the slope on the score is {evidence.slope:.3f}")
    if not evidence.agreement > 0:
        reasons.append(f"WRONG_SIGN: predicted scores correlate with influence by {evidence.agreement:.3f}")
    if evidence.active is not None:
        difference = paired_bootstrap(candidate.per_query, evidence.active.per_query, seed=seed,
                                      lower_quantile=1.0 - limits.confidence)
        metrics |= {"active_map": evidence.active.mean, "gain": difference.mean, "gain_lower_bound": difference.low}
        if difference.low < -limits.tolerance:
            reasons.append(f"REGRESSION: against the active release mAP changes by {difference.mean:+.4f}, at "
                           f"{limits.confidence:.0%} confidence by no less than {difference.low:+.4f}; "
                           f"allowed is {-limits.tolerance:+.4f}")
    slices = _slices(evidence, limits)
    reasons += _worse(slices, limits)
    metrics |= _counted(slices)
    for more_reasons, more_metrics in (_calibration(evidence, limits), _false_attribution(evidence, limits)):
        reasons += more_reasons
        metrics |= more_metrics
    return GateDecision(not reasons, tuple(reasons), metrics, slices)


def _slices(evidence: GateEvidence, limits: GateLimits) -> tuple[SliceVerdict, ...]:
    if evidence.active is None:
        return ()
    return judge_slices(evidence.slices, evidence.candidate.per_query, evidence.active.per_query, limits.confidence)


def _worse(slices: tuple[SliceVerdict, ...], limits: GateLimits) -> list[str]:
    return [
        f"SLICE_REGRESSION: on {one.queries} queries of {one.cut} = {one.name} mAP changes by {one.gain:+.4f} against "
        f"the active release, at {limits.confidence:.0%} confidence over all slices by no more than "
        f"{one.at_most:+.4f}; allowed is {-limits.slice_tolerance:+.4f}"
        for one in slices if one.at_most is not None and one.at_most < -limits.slice_tolerance
    ]


def _counted(slices: tuple[SliceVerdict, ...]) -> dict[str, float]:
    judged = sum(one.at_most is not None for one in slices)
    return {"slices_judged": float(judged), "slices_too_small": float(len(slices) - judged)} if slices else {}


def _calibration(evidence: GateEvidence, limits: GateLimits) -> tuple[list[str], dict[str, float]]:
    """A few dozen queries give an error even to a perfect calibration: it must exceed the limit and that error."""
    report = evidence.calibration
    if report is None:
        return [], {}
    found = report.retrieved
    metrics = {"calibration_error": found.error, "calibration_error_luck": found.luck,
               "calibration_error_all_items": report.everything.error, "interval_coverage": report.coverage}
    if found.error <= max(limits.calibration_error, found.luck):
        return [], metrics
    return [f"CALIBRATION_ERROR: over the first {report.top} retrieved items probabilities are off by "
            f"{found.error:.3f} on average, allowed is {limits.calibration_error:.3f} (luck alone: up to "
            f"{found.luck:.3f})"], metrics


def _false_attribution(evidence: GateEvidence, limits: GateLimits) -> tuple[list[str], dict[str, float]]:
    """The lower confidence bound of the share must not exceed the limit, which the floors were fitted to keep."""
    report = evidence.abstention
    if report is None:
        return [], {}
    metrics = {"false_attribution": report.pooled, "real_queries_refused": report.refused}
    if report.surely_above <= limits.false_attribution:
        return [], metrics
    return [f"FALSE_ATTRIBUTION: {report.pooled:.1%} of {report.nulls} null queries are attributed, surely more than "
            f"{report.surely_above:.1%}; allowed is {limits.false_attribution:.1%}"], metrics


def score_agreement(scores: np.ndarray, tau: np.ndarray) -> float:
    """Mean over queries of the correlation between predicted scores and ranks of τ, both [q, n], NaN ignored."""
    values: list[float] = []
    for predicted, wanted in zip(scores, tau, strict=True):
        scored = ~np.isnan(wanted)
        if scored.sum() < 2:
            continue
        ranks = np.argsort(np.argsort(wanted[scored], kind="stable"), kind="stable").astype(np.float64)
        guess = np.argsort(np.argsort(predicted[scored], kind="stable"), kind="stable").astype(np.float64)
        values.append(float(np.corrcoef(ranks, guess)[0, 1]))
    return float(np.mean(values)) if values else float("nan")
