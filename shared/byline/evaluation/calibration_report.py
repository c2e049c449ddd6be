"""Is a calibrator right on queries it was not fitted on? Calibration error, coverage, and what luck alone would give.

Why it exists: an expected calibration error of a few dozen queries is never zero, because items of one query err
together. A gate that ignores this refuses good releases at random, so the error always comes with the error that
chance gives a perfectly calibrated student on as many queries.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from byline.evaluation.calibration import Curve
from byline.evaluation.calibration_fit import judged_rows, margins_of, positives, query_shares

DoubleArray = npt.NDArray[np.float64]
BINS = 15
SIGN_DRAWS = 200


@dataclass(frozen=True)
class Reliability:
    """``error`` is the expected calibration error; ``luck`` its 95 % quantile if the probabilities were right.

    ``stated`` and ``found`` [b] are mean probability and share of positives in bins of equal size.
    """

    error: float
    luck: float
    stated: tuple[float, ...]
    found: tuple[float, ...]
    pairs: int
    queries: int

    def to_json(self) -> dict[str, Any]:
        """As kept in a release's metrics."""
        return asdict(self) | {"stated": list(self.stated), "found": list(self.found)}


@dataclass(frozen=True)
class CalibrationReport:
    """``retrieved``: over each query's first L retrieved items, what answers are made of. ``everything``: all items.

    ``shown``: over the first 20. ``coverage``: share of (query, range of margins) whose share of positives lies in
    the interval, of which the curve states ``nominal``; ``width`` is the mean width of those intervals.
    """

    top: int
    retrieved: Reliability
    shown: Reliability
    everything: Reliability
    nominal: float
    coverage: float
    width: float

    def to_json(self) -> dict[str, Any]:
        """As kept in a release's metrics."""
        parts = {name: getattr(self, name).to_json() for name in ("retrieved", "shown", "everything")}
        return {"top": self.top, **parts, "interval": {
            "nominal": self.nominal, "coverage": self.coverage, "mean_width": self.width}}


def expected_calibration_error(stated: DoubleArray, found: DoubleArray, bins: int = BINS) -> float:
    """Σ over bins of equal size of |mean stated − mean found| · share of the pairs.

    ECE of Naeini, Cooper & Hauskrecht (AAAI 2015) with equal-mass bins (Nguyen & O'Connor, EMNLP 2015).
    ``stated`` [m] probabilities, ``found`` [m] outcomes in {0, 1}; ties are kept together by a stable order.
    """
    order = np.argsort(stated, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return float(sum(abs(float((stated[part] - found[part]).sum())) for part in parts) / max(1, len(stated)))


def reliability(stated: DoubleArray, found: DoubleArray, query: npt.NDArray[np.int64], seed: int) -> Reliability:
    """Of pairs [m] that belong to queries ``query`` [m].

    ``luck`` flips the sign of each query's residuals as a whole (wild cluster bootstrap; Cameron, Gelbach & Miller,
    Review of Economics and Statistics 2008): queries keep their own errors, their common error vanishes.
    """
    order = np.argsort(stated, kind="stable")
    parts = [part for part in np.array_split(order, BINS) if len(part)]
    names, place = np.unique(query, return_inverse=True)
    sums = np.stack([np.bincount(place[part], (stated - found)[part], len(names)) for part in parts])  # [b, q]
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(len(names), SIGN_DRAWS))
    draws = np.abs(sums @ signs).sum(0) / len(stated)
    return Reliability(
        float(np.abs(sums.sum(1)).sum() / len(stated)), float(np.quantile(draws, 0.95)),
        tuple(float(stated[part].mean()) for part in parts), tuple(float(found[part].mean()) for part in parts),
        int(len(stated)), int(len(names)),
    )


def report_calibration(curve: Curve, scores: npt.NDArray[np.float32], tau: npt.NDArray[np.float32], *, top: int,
                       seed: int, shown: int = 20) -> CalibrationReport | None:
    """Judge ``curve`` on queries it was not fitted on; None if none of them has 2 L scored items."""
    rows = judged_rows(tau, top)
    if not len(rows):
        return None
    scores, tau = scores[rows], tau[rows]
    scored, wanted = ~np.isnan(tau), positives(tau, top)
    margins = margins_of(scores, top)
    stated = curve.at(margins)[0]
    place = np.empty(scores.shape, dtype=np.int64)
    np.put_along_axis(place, np.argsort(-scores, axis=1, kind="stable"),
                      np.broadcast_to(np.arange(scores.shape[1]), scores.shape), axis=1)
    query = np.broadcast_to(np.arange(len(rows))[:, None], scores.shape)

    def among(first: int) -> Reliability:
        inside = scored & (place < first)
        return reliability(stated[inside], wanted[inside].astype(np.float64), query[inside], seed)

    shares = query_shares(margins, wanted, scored, curve.edges)
    known = ~np.isnan(shares)
    # As served: an interval always holds its own probability, taken at the middle of the range.
    held = (shares >= curve.low[:, None] - 1e-9) & (shares <= curve.high[:, None] + 1e-9)
    return CalibrationReport(
        top, among(top), among(min(shown, top)), among(scores.shape[1]), float(curve.coverage or 0.0),
        float(held[known].mean()), float((curve.high - curve.low).mean()),
    )
