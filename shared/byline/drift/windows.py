"""Measured queries summed up by time window and prompt cluster, with intervals, and the rule that calls a fall a fall.

Why it exists: agreement on one query says little and on all queries of a year hides what happened last week. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

#: Two-sided 95 % quantiles of Student's t by degrees of freedom; between them the next smaller one, which is wider.
_T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 15: 2.131, 20: 2.086, 30: 2.042,
        60: 2.0, 120: 1.98}  # fmt: skip
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Measured:
    """One query's figures; NaN where it has none."""

    at: datetime
    cluster: int | None
    release_id: str | None
    overlap: float
    spearman: float
    #: Mean probability said, less the share that was right.
    calibration: float


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval (Student's t over queries); all NaN without values, an open one for a single."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Window:
    """Figures of the queries in [start, end) of one cluster (None: of all)."""

    start: datetime
    end: datetime
    cluster: int | None
    queries: int
    overlap: Mean
    spearman: Mean
    calibration: Mean


@dataclass(frozen=True)
class DriftRule:
    """A fall of overlap by more than ``tolerance``, sure at 95 %, between ``minimum`` queries or more on each side."""

    window: timedelta = timedelta(days=1)
    reference_windows: int = 7
    tolerance: float = 0.05
    minimum: int = 8


@dataclass(frozen=True)
class Fall:
    """Overlap ``before`` and ``now``, of which cluster (None: of all); the fall is at least ``at_least``."""

    cluster: int | None
    before: Mean
    now: Mean
    at_least: float


def mean_of(values: Iterable[float]) -> Mean:
    """Mean and interval of the values that are not NaN."""
    found = [value for value in values if not math.isnan(value)]
    n = len(found)
    if n == 0:
        return Mean(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(found) / n
    if n == 1:
        return Mean(mean, -math.inf, math.inf, 1)
    half = _quantile(n - 1) * _standard_error(found, mean)
    return Mean(mean, mean - half, mean + half, n)


def windows(rows: Sequence[Measured], length: timedelta, *, by_cluster: bool = True) -> list[Window]:
    """Every window in which something was measured, latest first: of all queries, then of each cluster.

    Windows are aligned to fixed times, so that a window is the same whoever asks and whenever.
    """
    groups: dict[tuple[datetime, int | None], list[Measured]] = {}
    for row in rows:
        start = _EPOCH + ((row.at - _EPOCH) // length) * length
        groups.setdefault((start, None), []).append(row)
        if by_cluster and row.cluster is not None:
            groups.setdefault((start, row.cluster), []).append(row)
    order = sorted(groups, key=lambda key: (-key[0].timestamp(), -1 if key[1] is None else key[1]))
    return [_window(start, start + length, cluster, groups[start, cluster]) for start, cluster in order]


def falls(rows: Sequence[Measured], now: datetime, rule: DriftRule, *, release_id: str | None = None) -> list[Fall]:
    """Where the last ``window`` is surely worse than the ``reference_windows`` before it: of all queries, by cluster.

    Of the last window only what ``release_id`` answered counts, if it is given: the one that answers now shall not be
    blamed for the one that it replaced. Looking at several clusters at once would raise false alarms; their tests share
    the 5 %, all queries have their own.
    """
    recent = [row for row in rows if now - rule.window <= row.at <= now and release_id in (None, row.release_id)]
    first = now - rule.window * (1 + rule.reference_windows)
    before = [row for row in rows if first <= row.at < now - rule.window]
    clusters = sorted({row.cluster for row in recent if row.cluster is not None})
    found = [_fall(before, recent, None, rule, 1)]
    for cluster in clusters:
        found.append(_fall([row for row in before if row.cluster == cluster],
                           [row for row in recent if row.cluster == cluster], cluster, rule, len(clusters)))
    return [fall for fall in found if fall is not None]


def _fall(before: Sequence[Measured], now: Sequence[Measured], cluster: int | None, rule: DriftRule, tests: int
          ) -> Fall | None:
    then, current = (_known(rows) for rows in (before, now))
    if min(len(then), len(current)) < rule.minimum:
        return None
    means = mean_of(then), mean_of(current)
    error = math.hypot(_standard_error(then, means[0].value), _standard_error(current, means[1].value))
    # The quantile of the smaller side, and wider for several tests: 2.5 % of one side shared among them.
    width = _quantile(min(len(then), len(current)) - 1) * (1.0 + 0.15 * math.log2(tests))
    at_least = means[0].value - means[1].value - width * error
    return Fall(cluster, *means, at_least) if at_least > rule.tolerance else None


def _known(rows: Sequence[Measured]) -> list[float]:
    return [row.overlap for row in rows if not math.isnan(row.overlap)]


def _standard_error(values: Sequence[float], mean: float) -> float:
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _quantile(degrees: int) -> float:
    return next(value for limit, value in sorted(_T95.items(), reverse=True) if limit <= degrees)


def _window(start: datetime, end: datetime, cluster: int | None, rows: Sequence[Measured]) -> Window:
    return Window(start, end, cluster, len(rows), mean_of(row.overlap for row in rows),
                  mean_of(row.spearman for row in rows), mean_of(row.calibration for row in rows))
