"""Leave-k-out: take away the k images a method names, train again, and see what becomes of the query.

Why it exists: the question a user really asks. Three traps were measured (reference/measured.md, C4): the base model
drew the query itself, so *any* other training raises its loss; removing images moves all queries; and one run is an
accident. So a rise is counted against runs with nothing removed, the target query is contrasted with queries that were
no target, and every arm has a seed of its own.

One retraining serves several queries: the union of what is named for a group of mutually distant ones is removed, each
of them is a target, all others are the contrast. One query an arm is the published protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from byline.errors import LabelsNotUsable

DoubleArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Arm:
    """One retraining of one method: ``removed`` item ids, named for the queries ``targets``, ``k`` for each."""

    method: str
    k: int
    group: int
    targets: tuple[int, ...]
    removed: tuple[int, ...]


@dataclass(frozen=True)
class Share:
    """Leave out ``fraction`` of the corpus for each of ``queries_per_arm`` targets of one retraining."""

    fraction: float
    queries_per_arm: int

    def count(self, items: int) -> int:
        """k of a corpus of ``items``."""
        return max(1, round(self.fraction * items))


#: 1 % first, since an early stop should leave the most telling figure; more targets an arm where k is small, so that
#: no arm leaves out more than a fifth of the corpus.
SHARES = (Share(0.01, 10), Share(0.04, 5), Share(0.005, 10))


@dataclass(frozen=True)
class Contrast:
    """Mean over target queries of (target's change − mean change of the arm's other queries), with standard error."""

    mean: float
    error: float
    per_target: dict[int, float]


def distant_groups(likeness: DoubleArray, size: int) -> list[tuple[int, ...]]:
    """All queries in groups of ``size`` (the last may be smaller), members unlike each other; ``likeness`` [q, q].

    Greedy and deterministic: a group begins with the first query left and takes, again and again, the one whose
    greatest likeness to the members is smallest. What one target loses is then seldom what another one needs.
    """
    left = list(range(len(likeness)))
    groups: list[tuple[int, ...]] = []
    while left:
        group = [left.pop(0)]
        while left and len(group) < size:
            nearest = likeness[np.ix_(left, group)].max(1)
            group.append(left.pop(int(np.argmin(nearest))))
        groups.append(tuple(sorted(group)))
    return groups


def top_items(tau: DoubleArray, item_ids: npt.NDArray[np.int64], k: int) -> tuple[int, ...]:
    """The ``k`` most influential ids of ``tau`` [n], ties by id."""
    order = np.lexsort((item_ids, -tau))
    return tuple(int(i) for i in item_ids[order[:k]])


def plan_arm(method: str, tau: DoubleArray, item_ids: npt.NDArray[np.int64], k: int, group: int,
             targets: Sequence[int]) -> Arm:
    """The arm that removes the union of the ``targets``' top ``k``; ``tau`` [q, n] of all queries."""
    removed = {i for q in targets for i in top_items(tau[q], item_ids, k)}
    return Arm(method, k, group, tuple(targets), tuple(sorted(removed)))


def plan_arms(methods: Mapping[str, DoubleArray], item_ids: npt.NDArray[np.int64], likeness: DoubleArray,
              shares: Sequence[Share] = SHARES) -> list[Arm]:
    """All arms of all ``methods`` (tau [q, n]) in the order in which they should be run.

    Queries are split into distant groups of the largest ``queries_per_arm``, a group into smaller ones for the other
    shares. All methods of one group and share come together: whatever an early stop leaves can be compared.
    """
    queries = len(likeness)
    if queries < 2:
        raise LabelsNotUsable("a target is contrasted with other queries: the study needs at least two")
    arms: list[Arm] = []
    # At least half of the queries are no targets: the contrast rests on them.
    for number, group in enumerate(distant_groups(likeness, min(queries // 2, max(s.queries_per_arm for s in shares)))):
        for share in shares:
            for start in range(0, len(group), share.queries_per_arm):
                targets = group[start : start + share.queries_per_arm]
                arms.extend(plan_arm(m, tau, item_ids, share.count(len(item_ids)), number, targets)
                            for m, tau in methods.items())  # fmt: skip
    return arms


def relative_change(losses: DoubleArray, nothing: DoubleArray) -> DoubleArray:
    """Rise of each query's loss in per cent of its mean over the runs with nothing removed.

    ``losses`` [q], ``nothing`` [runs, q]; LabelsNotUsable without such a run.
    """
    if not len(nothing):
        raise LabelsNotUsable("no run with nothing removed is there to compare with; let the command finish one")
    base = nothing.mean(0)
    change: DoubleArray = 100 * (losses - base) / base
    return change


def plain_change(values: DoubleArray, nothing: DoubleArray) -> DoubleArray:
    """Change of each query's value against its mean over the runs with nothing removed; [q]."""
    if not len(nothing):
        raise LabelsNotUsable("no run with nothing removed is there to compare with; let the command finish one")
    change: DoubleArray = values - nothing.mean(0)
    return change


def target_contrast(change: DoubleArray, targets: Sequence[int]) -> dict[int, float]:
    """Per target: its change minus the mean change of the queries that were no target; ``change`` [q]."""
    others = np.setdiff1d(np.arange(len(change)), np.asarray(targets))
    if not len(others):
        raise LabelsNotUsable("every query is a target of this arm; the contrast needs others: lower queries_per_arm")
    return {int(t): float(change[t] - change[others].mean()) for t in targets}


def summarise_contrast(per_target: Mapping[int, float]) -> Contrast:
    """Mean and standard error over targets."""
    values = np.array(list(per_target.values()), dtype=np.float64)
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return Contrast(float(values.mean()), error, dict(per_target))


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> Contrast | None:
    """``a`` − ``b`` over the targets both have; None when they share none."""
    common = sorted(set(a) & set(b))
    return summarise_contrast({t: a[t] - b[t] for t in common}) if common else None
