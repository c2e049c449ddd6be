"""What one new ranking says: how well the student did on it, and what its shortlists missed.

Why it exists: a ranking that was made after a release is a fair test of that release, whoever asked for it. Pure
functions of scores and ids.

Candidates are two shortlists and a uniform sample of everything outside both. An item of the sample therefore stands
for ``outside / sample`` items of the corpus, and all estimates about the corpus weigh it so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from byline.evaluation.agreement import overlap, spearman

Ids = NDArray[np.int64]
Scores = NDArray[np.floating]

#: Overlap is measured at this many items: what an answer shows.
OVERLAP_AT = 20


@dataclass(frozen=True)
class Agreement:
    """Of two orders of the same ``n`` candidates. NaN where there are too few candidates to say."""

    n: int
    k: int
    overlap: float
    spearman: float


@dataclass(frozen=True)
class Pruning:
    """``missed``: unbiased estimate of how many items outside both shortlists beat the L-th best inside.

    ``lost`` is that number by L, and so without bias as well: at most this share of the teacher's top L is missed, and
    about this share where it is small. A single query's may be above 1, since every item seen stands for many; only a
    mean over queries means something.
    """

    lost: float
    missed: float


@dataclass(frozen=True)
class Calibrated:
    """Mean probability said of the candidates that the student would name, and the share of them that was right."""

    predicted: float
    observed: float


def agree(student: Scores, teacher: Scores, k: int = OVERLAP_AT) -> Agreement:
    """How alike two score vectors [n] order the candidates. ``k`` is halved for fewer than ``2 k`` candidates."""
    n = len(teacher)
    at = min(k, n // 2)
    return Agreement(n, at, overlap(student, teacher, at) if at else math.nan, spearman(student, teacher))


def pruning(item_ids: Ids, tau: Scores, explored: Ids, outside: int, top: int) -> Pruning | None:
    """What pruning to the shortlists missed. None where nothing outside was looked at, or the top is not inside.

    ``item_ids``, ``tau`` [n] of the whole ranking; ``explored`` the ids of the uniform sample; ``outside`` how many
    items both shortlists left out; ``top``: L.
    """
    sampled = np.isin(item_ids, explored)
    seen, inside = int(sampled.sum()), int((~sampled).sum())
    if outside == 0:
        return Pruning(0.0, 0.0)
    if seen == 0 or inside < top:
        return None
    last_inside = float(np.sort(tau[~sampled])[-top])
    missed = outside / seen * float((tau[sampled] > last_inside).sum())
    return Pruning(missed / top, missed)


def top_threshold(item_ids: Ids, tau: Scores, explored: Ids, outside: int, top: int) -> float | None:
    """τ that an item of the top L has at least: that of the L-th best inside. The few items that pruning missed would
    raise it a little; to weigh the sampled ones would move it by hundreds of places. None where the shortlists hold
    fewer than twice L items of a larger corpus: then too much of the top may be outside."""
    inside = np.sort(tau[~np.isin(item_ids, explored)])
    if outside and len(inside) < 2 * top:
        return None
    return float(inside[-top]) if len(inside) >= top else -math.inf


def calibrated(item_ids: Ids, probabilities: dict[int, float], tau: Scores, threshold: float) -> Calibrated | None:
    """Whether the probabilities said of the student's items hold; None if none of them was ranked."""
    said = np.array([probabilities.get(item_id, math.nan) for item_id in item_ids.tolist()])
    known = ~np.isnan(said)
    if not known.any():
        return None
    return Calibrated(float(said[known].mean()), float((tau[known] >= threshold).mean()))
