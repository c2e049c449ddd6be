"""Which of many possible queries to label next: far from those labelled, disputed, and some by chance alone.

Why it exists: a label costs minutes of teacher, so it should teach the head something new; but labels chosen for being
unusual say nothing about usual queries. A uniform share is therefore drawn beforehand, by whoever calls, from *all*
queries and not from those that choosing has left over, and marked: estimates rest on it alone.
Pure and seeded: the live planner and the simulation of a year call the same function.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]
Reason = Literal["uniform", "far", "disagreement"]
#: Rows of candidates compared with all labelled queries at once: some tens of megabytes.
_CHUNK = 2048


@dataclass(frozen=True)
class Chosen:
    """One candidate that was chosen, or was drawn before."""

    index: int
    reason: Reason


def uniform_count(count: int, share: float, rng: np.random.Generator) -> int:
    """How many of ``count`` are drawn by chance alone: ``share`` of them on average.

    Rounded at random: a share of a small batch would else be always none, or always one.
    """
    wanted = min(max(count * share, 0.0), float(count))
    return int(wanted) + int(rng.random() < wanted - int(wanted))


def select_queries(
    candidates: FloatArray,
    labelled: FloatArray,
    *,
    count: int,
    rng: np.random.Generator,
    drawn: Sequence[int] = (),
    disagreement: FloatArray | None = None,
    groups: Sequence[int] | NDArray[np.int64] | None = None,
    disputed_share: float = 0.5,
    sharpness: float = 2.0,
) -> list[Chosen]:
    """``count`` candidates to label, fewer if there are fewer groups; each at most once, one of each group.

    ``candidates`` [p, d] and ``labelled`` [l, d] (l may be 0) are rows that Euclidean distance compares; see
    :func:`comparable`. ``drawn`` are candidates that chance has taken already: they come first and count. The rest keep
    their distance from them. ``disagreement`` [p]: higher = student and teacher differ more, NaN where nobody knows.
    ``groups`` [p]: near-duplicate group of each candidate; a group already labelled is for the caller to leave out.

    Of the rest ``disputed_share`` (none without ``disagreement``) is drawn by rank of disagreement times distance, the
    others by distance alone, both to the nearest query labelled or chosen so far, so that one batch is spread out.
    ``sharpness``: chances grow with this power of the distance (2: as k-means++ does; ``inf``: always the farthest,
    which collects outliers).
    """
    number_of = candidates.shape[0]
    of_group = np.arange(number_of) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    count = min(count, len(np.unique(of_group)))
    if count <= 0:
        return []
    chosen = [Chosen(int(index), "uniform") for index in drawn][:count]

    nearest = distance_to_nearest(candidates, labelled)
    free = np.ones(number_of, dtype=bool)
    for one in chosen:
        free &= of_group != of_group[one.index]
        nearest = np.minimum(nearest, _distances(candidates, candidates[one.index]))
    ranks = None if disagreement is None else _ranks(np.asarray(disagreement, dtype=np.float64))
    reasons = _reasons(count - len(chosen), 0.0 if ranks is None else disputed_share, rng)
    for reason in reasons:
        far = np.where(np.isfinite(nearest), nearest, 1.0)  # nothing labelled yet: all are equally far
        appeal = far if reason == "far" or ranks is None else far * ranks
        if not (appeal[free] > 0).any():
            reason, appeal = "far", far
        index = _draw(appeal, free, sharpness, rng)
        chosen.append(Chosen(index, reason))
        free &= of_group != of_group[index]
        nearest = np.minimum(nearest, _distances(candidates, candidates[index]))
    return chosen


def distance_to_nearest(rows: FloatArray, others: FloatArray) -> FloatArray:
    """[p]: how far each row of [p, d] is from the nearest of ``others`` [l, d]; infinite where l is 0."""
    if others.shape[0] == 0:
        return np.full(rows.shape[0], np.inf)
    found = np.empty(rows.shape[0])
    norms = np.einsum("ij,ij->i", others, others)
    for start in range(0, rows.shape[0], _CHUNK):
        part = rows[start : start + _CHUNK]
        squared = np.einsum("ij,ij->i", part, part)[:, None] - 2.0 * part @ others.T + norms
        found[start : start + _CHUNK] = np.sqrt(np.maximum(squared.min(1), 0.0))
    return found


def comparable(*tables: FloatArray) -> tuple[NDArray[np.float32], ...]:
    """The tables with every column standardised over all rows together and every row of unit norm.

    Without it one block of features with large numbers would decide alone what is far.
    """
    every = np.concatenate(tables)
    mean, deviation = every.mean(0), every.std(0) + 1e-6
    out = []
    for table in tables:
        rows = (table - mean) / deviation
        out.append((rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-9)).astype(np.float32))
    return tuple(out)


def _distances(rows: FloatArray, one: FloatArray) -> FloatArray:
    difference = rows - one
    return np.asarray(np.linalg.norm(difference, axis=1))


def _ranks(disagreement: FloatArray) -> FloatArray:
    """[p] from above 0 (least) to 1 (most), 0 where it is unknown: scores of any scale weigh the same."""
    ranks = np.zeros(len(disagreement))
    known = np.flatnonzero(np.isfinite(disagreement))
    values, places = np.unique(disagreement[known], return_inverse=True)
    ranks[known] = (places + 1) / max(len(values), 1)
    return ranks


def _reasons(count: int, disputed_share: float, rng: np.random.Generator) -> Iterator[Reason]:
    wanted = count * disputed_share
    disputed = int(wanted) + int(rng.random() < wanted - int(wanted))
    for number in range(count):
        # Alternating as long as both are left: neither takes all the good places first.
        yield "disagreement" if (number + 1) * disputed // count > number * disputed // count else "far"


def _draw(appeal: FloatArray, free: NDArray[np.bool_], sharpness: float, rng: np.random.Generator) -> int:
    left = np.flatnonzero(free)
    peak = float(appeal[left].max())
    if peak <= 0:
        return int(rng.choice(left))
    if np.isinf(sharpness):
        return int(left[int(np.argmax(appeal[left]))])
    weights = (appeal[left] / peak) ** sharpness
    return int(rng.choice(left, p=weights / weights.sum()))
