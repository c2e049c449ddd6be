"""Linear datamodeling score: do a teacher's scores add up to what training on a part of the corpus really gives?

Why it exists: the cheapest honest witness. A few dozen retrainings on random halves judge every variant of every
teacher at once: tau summed over a half predicts how well the model trained on that half knows the query. Defined in
TRAK (Park et al. 2023, section 4); the query's loss stands for the output, and since more influence kept means a
lower loss, predictions are compared with *minus* the loss: a good teacher scores above zero, a teacher of wrong sign
below.

Errors are of two kinds, and both are reported: other queries might have been asked (spread over queries), and other
halves might have been drawn (bootstrap over the retrainings, which all queries share).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from byline.errors import LabelsNotUsable

DoubleArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class LdsDifference:
    """LDS of one teacher minus another's on the same subsets and queries; errors as in ``LdsScore``."""

    mean: float
    error_queries: float
    error_subsets: float
    error: float


@dataclass(frozen=True)
class LdsScore:
    """Spearman over subsets, averaged over queries: ``mean``; ``per_query`` [q].

    ``error_queries`` is its standard error over queries, ``error_subsets`` that over the retrainings (bootstrap),
    ``error`` resamples both. ``pooled`` is Pearson's correlation of all (subset, query) pairs after taking each
    query's mean over subsets out of both sides and dividing by its spread. ``lead`` is the reference minus this.
    """

    mean: float
    error_queries: float
    error_subsets: float
    error: float
    pooled: float
    per_query: DoubleArray
    lead: LdsDifference | None = None


def predictions(tau: DoubleArray, kept: BoolArray) -> DoubleArray:
    """Summed tau of each subset for each query, [m, q]: ``tau`` [q, n], ``kept`` [m, n]."""
    if tau.shape[1] != kept.shape[1]:
        raise LabelsNotUsable(f"tau is of {tau.shape[1]} items, the subsets of {kept.shape[1]}")
    return kept.astype(np.float64) @ tau.T


def score_lds(predicted: DoubleArray, losses: DoubleArray, *, seed: int = 0, draws: int = 200) -> LdsScore:
    """LDS of one teacher; see ``judge_lds``."""
    return judge_lds({"": predicted}, losses, seed=seed, draws=draws)[""]


def judge_lds(predicted: Mapping[str, DoubleArray], losses: DoubleArray, *, reference: str | None = None,
              seed: int = 0, draws: int = 200) -> dict[str, LdsScore]:
    """LDS of each teacher's predictions [m, q] against the query losses [m, q] of m retrainings.

    All are judged on the same bootstrap samples, so that the lead of ``reference`` over each is paired. A query whose
    predictions are all equal scores 0: it predicts nothing. LabelsNotUsable with fewer than 3 subsets.
    """
    for values in predicted.values():
        _check(values, losses)
    if not predicted:
        return {}
    stacked = np.stack(list(predicted.values()), axis=1)  # [m, v, q]
    rng = np.random.default_rng([seed, 1])
    rows = rng.integers(0, len(losses), size=(draws, len(losses)))
    resampled = np.stack([_spearman(stacked[r], -losses[r][:, None]) for r in rows])  # [draws, v, q]
    exact = _spearman(stacked, -losses[:, None])  # [v, q]
    place = list(predicted).index(reference) if reference is not None else None
    found = {}
    for v, name in enumerate(predicted):
        lead = None
        if place is not None and place != v:
            lead = LdsDifference(*_summary(exact[place] - exact[v], resampled[:, place] - resampled[:, v], seed))
        found[name] = LdsScore(*_summary(exact[v], resampled[:, v], seed), pooled=_pooled(stacked[:, v], -losses),
                               per_query=exact[v], lead=lead)  # fmt: skip
    return found


def _check(predicted: DoubleArray, losses: DoubleArray) -> None:
    if predicted.shape != losses.shape or predicted.ndim != 2:
        raise LabelsNotUsable(f"predictions {predicted.shape} and losses {losses.shape} must be [subsets, queries]")
    if len(losses) < 3:
        raise LabelsNotUsable(f"{len(losses)} retrainings have no rank correlation worth the name; run at least 3")


def _summary(per_query: DoubleArray, resampled: DoubleArray, seed: int) -> tuple[float, float, float, float]:
    """Mean over queries [q]; its error over queries, over subsets (``resampled`` [draws, q]), and over both."""
    count = len(per_query)
    over_queries = float(per_query.std(ddof=1) / np.sqrt(count)) if count > 1 else float("nan")
    queries = np.random.default_rng([seed, 2]).integers(0, count, size=resampled.shape)
    both = np.take_along_axis(resampled, queries, axis=1).mean(1)
    return float(per_query.mean()), over_queries, float(resampled.mean(1).std(ddof=1)), float(both.std(ddof=1))


def _ranks(values: DoubleArray) -> DoubleArray:
    """Ranks along axis 0, ties at their average; same shape."""
    below = (values[:, None] > values[None]).sum(1)
    equal = (values[:, None] == values[None]).sum(1)
    ranks: DoubleArray = below + (equal - 1) / 2.0
    return ranks


def _spearman(a: DoubleArray, b: DoubleArray) -> DoubleArray:
    """Spearman's correlation along axis 0, of what remains when both are broadcast; 0 where a side is constant."""
    x, y = (_ranks(v) - (len(v) - 1) / 2.0 for v in (a, b))
    scale = np.sqrt((x**2).sum(0) * (y**2).sum(0))
    found: DoubleArray = np.divide((x * y).sum(0), scale, out=np.zeros(scale.shape), where=scale > 0)
    return found


def _pooled(a: DoubleArray, b: DoubleArray) -> float:
    """Pearson over all (subset, query) pairs, each query centred and scaled to unit spread."""
    x, y = (v - v.mean(0) for v in (a, b))
    x, y = (np.divide(v, s, out=np.zeros_like(v), where=s > 0) for v, s in ((x, x.std(0)), (y, y.std(0))))
    scale = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / scale) if scale > 0 else 0.0
