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

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from byline.errors import LabelsNotUsable

DoubleArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class LdsScore:
    """Spearman over subsets, averaged over queries: ``mean``; ``per_query`` [q].

    ``error_queries`` is its standard error over queries, ``error_subsets`` that over the retrainings (bootstrap),
    ``error`` resamples both. ``pooled`` is Pearson's correlation of all (subset, query) pairs after taking each
    query's mean over subsets out of both sides and dividing by its spread.
    """

    mean: float
    error_queries: float
    error_subsets: float
    error: float
    pooled: float
    per_query: DoubleArray


@dataclass(frozen=True)
class LdsDifference:
    """LDS of one teacher minus another's on the same subsets and queries; ``error`` resamples both."""

    mean: float
    error_queries: float
    error_subsets: float
    error: float


def predictions(tau: DoubleArray, kept: BoolArray) -> DoubleArray:
    """Summed tau of each subset for each query, [m, q]: ``tau`` [q, n], ``kept`` [m, n]."""
    if tau.shape[1] != kept.shape[1]:
        raise LabelsNotUsable(f"tau is of {tau.shape[1]} items, the subsets of {kept.shape[1]}")
    return kept.astype(np.float64) @ tau.T


def score_lds(predicted: DoubleArray, losses: DoubleArray, *, seed: int = 0, draws: int = 400) -> LdsScore:
    """LDS of ``predicted`` [m, q] against the query losses [m, q] of m retrainings.

    A query whose predictions are all equal scores 0: it predicts nothing. LabelsNotUsable with fewer than 3 subsets.
    """
    _check(predicted, losses)
    per_query = _spearman(predicted, -losses)
    resampled = _resampled(predicted, losses, seed, draws)  # [draws, q]
    return LdsScore(
        mean=float(per_query.mean()), error_queries=_over_queries(per_query),
        error_subsets=float(resampled.mean(1).std(ddof=1)), error=_over_both(resampled, seed),
        pooled=_pooled(predicted, -losses), per_query=per_query,
    )  # fmt: skip


def compare_lds(a: DoubleArray, b: DoubleArray, losses: DoubleArray, *, seed: int = 0, draws: int = 400,
                ) -> LdsDifference:
    """LDS of the predictions ``a`` minus that of ``b``, both [m, q], on the same resamples."""
    _check(a, losses)
    _check(b, losses)
    difference = _spearman(a, -losses) - _spearman(b, -losses)
    resampled = _resampled(a, losses, seed, draws) - _resampled(b, losses, seed, draws)
    return LdsDifference(float(difference.mean()), _over_queries(difference),
                         float(resampled.mean(1).std(ddof=1)), _over_both(resampled, seed))


def _check(predicted: DoubleArray, losses: DoubleArray) -> None:
    if predicted.shape != losses.shape or predicted.ndim != 2:
        raise LabelsNotUsable(f"predictions {predicted.shape} and losses {losses.shape} must be [subsets, queries]")
    if len(losses) < 3:
        raise LabelsNotUsable(f"{len(losses)} retrainings have no rank correlation worth the name; run at least 3")


def _over_queries(per_query: DoubleArray) -> float:
    return float(per_query.std(ddof=1) / np.sqrt(len(per_query))) if len(per_query) > 1 else float("nan")


def _over_both(resampled: DoubleArray, seed: int) -> float:
    """Spread of the mean when subsets (rows of ``resampled`` [draws, q]) and queries are both drawn anew."""
    rng = np.random.default_rng([seed, 2])
    queries = rng.integers(0, resampled.shape[1], size=resampled.shape)
    return float(np.take_along_axis(resampled, queries, axis=1).mean(1).std(ddof=1))


def _resampled(predicted: DoubleArray, losses: DoubleArray, seed: int, draws: int) -> DoubleArray:
    """Per-query Spearman [draws, q] of bootstrap samples of the subsets."""
    rng = np.random.default_rng([seed, 1])
    rows = rng.integers(0, len(losses), size=(draws, len(losses)))
    return np.stack([_spearman(predicted[r], -losses[r]) for r in rows])


def _ranks(values: DoubleArray) -> DoubleArray:
    """Ranks along axis 0, ties at their average; [m, q]."""
    below = (values[:, None] > values[None]).sum(1)
    equal = (values[:, None] == values[None]).sum(1)
    ranks: DoubleArray = below + (equal - 1) / 2.0
    return ranks


def _spearman(a: DoubleArray, b: DoubleArray) -> DoubleArray:
    """Spearman's correlation along axis 0, [q]; 0 where a side is constant."""
    x, y = (_ranks(v) - (len(v) - 1) / 2.0 for v in (a, b))
    scale = np.sqrt((x**2).sum(0) * (y**2).sum(0))
    found: DoubleArray = np.divide((x * y).sum(0), scale, out=np.zeros(a.shape[1]), where=scale > 0)
    return found


def _pooled(a: DoubleArray, b: DoubleArray) -> float:
    """Pearson over all (subset, query) pairs, each query centred and scaled to unit spread."""
    x, y = (v - v.mean(0) for v in (a, b))
    x, y = (np.divide(v, s, out=np.zeros_like(v), where=s > 0) for v, s in ((x, x.std(0)), (y, y.std(0))))
    scale = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / scale) if scale > 0 else 0.0
