"""Fit the curve from margins to probabilities, and its interval, on held-out queries.

Why it exists: a student's scores are trained to order, not to mean anything, and level and scale differ from query to
query and from head to head. Two things make them probabilities: the margin over the query's own score at rank L in
units of its own spread, which makes queries comparable, and isotonic regression (Zadrozny & Elkan, KDD 2002), which
keeps the order and assumes no shape.

The interval is split conformal with *queries* as the exchangeable units, not pairs (items of one query are anything
but independent): within a range of margins, a query's share of items that are truly among the teacher's first L is
one number, and a new query's share is as near to the mean share as an order statistic of the held-out queries'
distances says, with the stated probability, whatever the distribution (Vovk, Gammerman & Shafer, "Algorithmic Learning
in a Random World", 2005, §2; groups as units: Dunn, Wasserman & Ramdas, JASA 2022). Two things bend the guarantee: the
ranges come from the same queries, and the head was stopped early on them; so its coverage is measured on test queries
in every release.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from sklearn.isotonic import IsotonicRegression

from byline.errors import LabelsNotUsable
from byline.evaluation.calibration import Curve, scale_free_margins

DoubleArray = npt.NDArray[np.float64]
#: Knots are merged to at most so many; the curve between them is a straight line.
KNOTS = 400
#: Ranges of margins begin at the typical margin of these multiples of L in the student's order.
RANGES = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 2.0, 4.0)


def positives(tau: npt.NDArray[np.float32], top: int) -> npt.NDArray[np.bool_]:
    """[q, n]: True for a query's first ``top`` items by τ (NaN: not scored, never positive)."""
    order = np.argsort(np.where(np.isnan(tau), np.inf, -tau), axis=1, kind="stable")[:, :top]
    found = np.zeros(tau.shape, dtype=bool)
    np.put_along_axis(found, order, True, axis=1)
    return found & ~np.isnan(tau)


def margins_of(scores: npt.NDArray[np.float32], reference_rank: int) -> DoubleArray:
    """[q, n]: ``scale_free_margins`` with each query's first ``reference_rank`` of all its items."""
    rank, exact = min(reference_rank, scores.shape[1]), scores.astype(np.float64)
    return scale_free_margins(exact, -np.partition(-exact, rank - 1, axis=1)[:, :rank])


def judged_rows(tau: npt.NDArray[np.float32], top: int) -> npt.NDArray[np.int64]:
    """The queries with enough scored items (2 L) for "among the first L" to mean the same."""
    return np.flatnonzero((~np.isnan(tau)).sum(1) >= 2 * top)


def fit_curve(scores: npt.NDArray[np.float32], tau: npt.NDArray[np.float32], *, top: int,
              coverage: float = 0.9) -> Curve:
    """The curve of held-out queries: student's ``scores`` [q, n] and the teacher's ``tau`` [q, n] (NaN: not scored).

    ``top`` is L. LabelsNotUsable if no query has 2 L scored items.
    """
    rows = judged_rows(tau, top)
    if not len(rows):
        raise LabelsNotUsable(f"no held-out query has {2 * top} scored items to calibrate the first {top} on")
    scored, wanted = ~np.isnan(tau[rows]), positives(tau[rows], top)
    margins = margins_of(scores[rows], top)
    model = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
    model.fit(margins[scored], wanted[scored].astype(np.float64))
    knots, values = _thinned(np.asarray(model.X_thresholds_), np.asarray(model.y_thresholds_))
    edges = _edges(margins, top)
    low, high = conformal_shares(margins, wanted, scored, edges, coverage)
    return Curve(top, knots, values, edges, low, high, coverage)


def conformal_shares(margins: DoubleArray, wanted: npt.NDArray[np.bool_], scored: npt.NDArray[np.bool_],
                     edges: DoubleArray, coverage: float) -> tuple[DoubleArray, DoubleArray]:
    """(low, high), each [b]: between them lies a new query's share of positives in each range of margins.

    0 and 1 where there are too few queries to say.
    """
    low, high = np.zeros(len(edges) + 1), np.ones(len(edges) + 1)
    for place, every in enumerate(query_shares(margins, wanted, scored, edges)):
        shares = every[~np.isnan(every)]
        # Rounded first: (n + 1) coverage is often a whole number that floats miss.
        rank = math.ceil(round((len(shares) + 1) * coverage, 9))
        if not len(shares) or rank > len(shares):
            continue
        mean = float(shares.mean())
        reach = float(np.sort(np.abs(shares - mean))[rank - 1])
        low[place], high[place] = max(0.0, mean - reach), min(1.0, mean + reach)
    return low, high


def query_shares(margins: DoubleArray, wanted: npt.NDArray[np.bool_], scored: npt.NDArray[np.bool_],
                 edges: DoubleArray) -> DoubleArray:
    """[b, q]: the share of positives among a query's items in each range of margins; NaN where it has none."""
    place = np.where(scored, np.searchsorted(edges, margins, side="right"), -1)
    out = np.full((len(edges) + 1, margins.shape[0]), np.nan)
    for number in range(len(edges) + 1):
        inside = place == number
        count = inside.sum(1)
        some = count > 0
        out[number, some] = (inside & wanted).sum(1)[some] / count[some]
    return out


def _edges(margins: DoubleArray, top: int) -> DoubleArray:
    ordered = -np.sort(-margins, axis=1)
    ranks = sorted({min(max(1, round(share * top)), margins.shape[1]) for share in RANGES})
    return np.unique(np.median(ordered[:, [rank - 1 for rank in ranks]], axis=0))


def _thinned(knots: DoubleArray, values: DoubleArray) -> tuple[DoubleArray, DoubleArray]:
    """At most ``KNOTS`` of them, spread evenly over their order, both ends kept."""
    chosen = np.unique(np.linspace(0, len(knots) - 1, min(KNOTS, len(knots))).round().astype(np.int64))
    return knots[chosen].astype(np.float64), values[chosen].astype(np.float64)
