"""mAP(L) exactly as the reference evaluation computes it.

Why it exists: "mAP" has many definitions. Here the positives of a query are the first L items of the teacher's full
ranking and the prediction is a full permutation of all scored items, never cut off:

    AP = (1/L) Σ_{j=1..L} j / pos_j,   pos_j = 1-based predicted position of the j-th positive met.

Chance is about L/N; the error is the population standard deviation over queries divided by √Q.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from byline.errors import LabelsNotUsable

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class MapResult:
    """Mean over queries, its standard error and the per-query values [q]; ``cutoff`` is L."""

    mean: float
    standard_error: float
    per_query: DoubleArray
    cutoff: int


def average_precision(predicted_order: npt.NDArray[np.integer], positives: npt.NDArray[np.integer]) -> float:
    """AP of one query: ``predicted_order`` [n] lists all items best first, ``positives`` [L] are the teacher's top."""
    hits = np.isin(predicted_order, positives)
    if positives.shape[0] == 0 or int(hits.sum()) != positives.shape[0]:
        raise LabelsNotUsable("the prediction must order every item once, and there must be positives")
    positions = np.flatnonzero(hits) + 1
    return float(np.mean(np.arange(1, positions.shape[0] + 1) / positions))


def mean_average_precision(scores: FloatArray, tau: FloatArray, cutoff: int) -> MapResult:
    """mAP(``cutoff``) of predicted ``scores`` [q, n] against the teacher's ``tau`` [q, n] (NaN = not scored).

    Both orders are strict: ties fall to the earlier position. Where a query has fewer than ``cutoff`` + 1 scored
    items, half of them are its positives. Queries without any scored item are left out.
    """
    if scores.shape != tau.shape:
        raise LabelsNotUsable(f"scores are {scores.shape}, tau is {tau.shape}")
    if np.isnan(scores[~np.isnan(tau)]).any():
        raise LabelsNotUsable("a predicted score is not a number")
    values: list[float] = []
    for row in range(tau.shape[0]):
        scored = np.flatnonzero(~np.isnan(tau[row]))
        if scored.shape[0] < 2:
            continue
        wanted = cutoff if scored.shape[0] > cutoff else max(1, scored.shape[0] // 2)
        positive = np.zeros(scored.shape[0], dtype=bool)
        positive[np.argsort(-tau[row, scored], kind="stable")[:wanted]] = True
        order = np.argsort(-scores[row, scored], kind="stable")
        positions = np.flatnonzero(positive[order]) + 1
        values.append(float(np.mean(np.arange(1, wanted + 1) / positions)))
    if not values:
        raise LabelsNotUsable("no query has a ranking to be judged by")
    per_query = np.asarray(values, dtype=np.float64)
    error = float(per_query.std() / np.sqrt(per_query.shape[0]))
    return MapResult(float(per_query.mean()), error, per_query, cutoff)
