"""What a head must beat: raw features, and orders that never look at the query's image.

Why it exists: some items influence almost everything, and a prompt alone says a lot. A head can look good by learning
only that, so the table of results always shows these baselines beside it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from byline.ranker.labelled_set import LabelledSet, influence_ranks

FloatArray = npt.NDArray[np.float32]


def raw_feature_scores(query_features: FloatArray, item_features: FloatArray, *,
                       query_mean: FloatArray | None = None) -> FloatArray:
    """Cosine [q, n] of features standardised per dimension by the items.

    ``query_mean`` [d], if given, centres the queries instead of the items' mean (generated images are shifted
    against real ones).
    """
    mean = item_features.mean(0, dtype=np.float64)
    deviation = item_features.std(0, dtype=np.float64)
    scale = np.where(deviation > 1e-6, 1.0 / np.maximum(deviation, 1e-6), 0.0)
    items = _unit((item_features - mean) * scale)
    queries = _unit((query_features - (mean if query_mean is None else query_mean)) * scale)
    return np.asarray(queries @ items.T, dtype=np.float32)


def combined_raw_scores(blocks: list[FloatArray]) -> FloatArray:
    """Equal-weight mean of the raw cosines [q, n] of several encoders."""
    return np.asarray(np.mean(np.stack(blocks), axis=0), dtype=np.float32)


def global_mean_rank_scores(train: LabelledSet, queries: int) -> FloatArray:
    """No query at all: minus each item's mean normalised rank over the training queries, the same for every query.

    Returns [queries, n]; items never scored sit in the middle.
    """
    row = -_mean_normalised_rank(train.tau, np.ones((1, train.queries)))
    return np.repeat(row.astype(np.float32), queries, axis=0)


def prompt_neighbour_scores(train: LabelledSet, train_text: FloatArray, query_text: FloatArray,
                            temperature: float = 0.05) -> FloatArray:
    """No image: items by their mean rank over training queries, weighted by similarity of the *prompts*.

    ``train_text`` [q_train, d] and ``query_text`` [q, d] are text features. Weights are a softmax of the cosine over
    ``temperature``; with prompts that repeat this is the mean rank per prompt. Returns [q, n].
    """
    mean = train_text.mean(0, dtype=np.float64)
    cosine = _unit(query_text - mean) @ _unit(train_text - mean).T
    weights = np.exp((cosine - cosine.max(1, keepdims=True)) / temperature)
    return np.asarray(-_mean_normalised_rank(train.tau, weights), dtype=np.float32)


def _mean_normalised_rank(tau: FloatArray, weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    ranks = influence_ranks(tau)
    scored = ranks >= 0
    share = np.where(scored, ranks / np.maximum(scored.sum(1, keepdims=True), 1), 0.0)
    mass = weights @ scored.astype(np.float64)
    return np.where(mass > 0, (weights @ share) / np.maximum(mass, 1e-12), 0.5)


def _unit(rows: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    rows = np.asarray(rows, dtype=np.float64)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), dtype=np.float64)
