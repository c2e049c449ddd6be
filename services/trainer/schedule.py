"""When to refresh, and from where to start: pure functions of counts and times.

Why it exists: a refresh costs minutes of a machine, so it waits for enough new rankings, or for a smaller number that
has waited long enough. What was tried last counts, published or not: a refused candidate must not be refitted from
the same labels for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta


@dataclass(frozen=True)
class LastRefresh:
    """The newest candidate, whatever became of it: how many rankings it saw, and when it was built."""

    rankings: int
    at: datetime


@dataclass(frozen=True)
class RefreshRule:
    """``min_new`` rankings trigger a refresh at once; any new one does after ``interval``."""

    min_new: int
    interval: timedelta


def refresh_due(rankings: int, last: LastRefresh | None, now: datetime, rule: RefreshRule) -> bool:
    """Whether to fit now. ``rankings`` counts the train and validation rankings stored."""
    if last is None:
        return rankings >= rule.min_new
    new = rankings - last.rankings
    return new >= rule.min_new or (new > 0 and now - last.at >= rule.interval)


def start_warm(rankings: int, active_rankings: int, growth: float = 0.2) -> bool:
    """Continue from the active head while the labels grew by less than ``growth``; beyond it, start afresh.

    A warm start takes a fraction of the time and cannot lose on validation; a fresh one leaves the old optimum.
    """
    return active_rankings > 0 and rankings <= active_rankings * (1.0 + growth)
