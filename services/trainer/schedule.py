"""Whether to refresh now, and why: a pure function of what was observed, what was tried last, and the time.

Why it exists: a refresh costs minutes of a machine, so it needs a reason: enough new rankings; a smaller number that
has waited long enough; a corpus that is not the active release's any more; a drift alarm; an operator. What was tried
last counts, published or not: a refused candidate must not be refitted from the same facts for ever. Every reason that
held goes into the release's manifest. After a rollback the head is the operator's choice: nothing but his request fits
another, and a changed corpus is published with the head that answers.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum


class Trigger(StrEnum):
    """Why a refresh was begun."""

    OPERATOR = "operator"
    DRIFT = "drift"
    CORPUS = "corpus"
    RANKINGS = "rankings"
    INTERVAL = "interval"


@dataclass(frozen=True)
class LastRefresh:
    """The newest candidate, whatever became of it: how many rankings it saw, and when it was begun."""

    rankings: int
    at: datetime


@dataclass(frozen=True)
class CorpusChange:
    """Items added and withdrawn since the active release's snapshot; ``last_at`` None: known only by their number."""

    added: int
    withdrawn: int
    last_at: datetime | None


@dataclass(frozen=True)
class DriftAlarm:
    """Student and teacher disagree more than they did. ``detail`` is for people."""

    raised_at: datetime
    detail: str
    alarm_id: int | None = None


@dataclass(frozen=True)
class RefreshAsked:
    """An operator's request that waits."""

    request_id: uuid.UUID
    principal: str
    reason: str


@dataclass(frozen=True)
class Observed:
    """What the trainer looks at. ``rankings`` counts those for training and validation; ``rolled_back_from`` is the
    release that an operator went back from (``ReleaseRegistry.rolled_back_from``)."""

    rankings: int
    corpus: CorpusChange | None = None
    alarm: DriftAlarm | None = None
    asked: tuple[RefreshAsked, ...] = ()
    rolled_back_from: str | None = None


@dataclass(frozen=True)
class RefreshRule:
    """``min_new`` rankings trigger at once; any new one does after ``interval``.

    A changed corpus triggers when it has been still for ``settle``: an ingest of hours is one change. What was tried
    for a corpus or an alarm that has not changed since is tried again after ``interval``.
    """

    min_new: int
    interval: timedelta
    settle: timedelta = timedelta(minutes=1)


@dataclass(frozen=True)
class Due:
    """One reason that holds now."""

    trigger: Trigger
    detail: str


def refresh_due(seen: Observed, last: LastRefresh | None, now: datetime, rule: RefreshRule) -> tuple[Due, ...]:
    """Every reason to refresh now, the most urgent first; empty: wait."""
    waited = last is None or now - last.at >= rule.interval
    found = [Due(Trigger.OPERATOR, _asked(one)) for one in seen.asked]
    if seen.alarm is not None and (waited or _since(seen.alarm.raised_at, last)):
        found.append(Due(Trigger.DRIFT, seen.alarm.detail))
    if seen.corpus is not None and _corpus_due(seen.corpus, last, now, rule, waited):
        found.append(Due(Trigger.CORPUS, f"{seen.corpus.added} items added, {seen.corpus.withdrawn} withdrawn since"
                                         " the active release"))
    new = seen.rankings - (last.rankings if last is not None else 0)
    if new >= rule.min_new:
        found.append(Due(Trigger.RANKINGS, f"{new} new rankings"))
    elif last is not None and new > 0 and waited:
        found.append(Due(Trigger.INTERVAL, f"{new} new rankings waited for {rule.interval}"))
    if seen.rolled_back_from is not None:
        found = [one for one in found if one.trigger in (Trigger.OPERATOR, Trigger.CORPUS)]
    return tuple(found)


def keeps_head(seen: Observed, due: Sequence[Due]) -> bool:
    """Whether the head that answers is to be published again whatever was learnt since: after a rollback, until an
    operator asks for a refresh."""
    return seen.rolled_back_from is not None and all(one.trigger is not Trigger.OPERATOR for one in due)


def needs_fit(due: Sequence[Due], labels_changed: bool) -> bool:
    """Whether a head is to be fitted: not if only the corpus changed, for which the head is good as it is."""
    return labels_changed or not due or any(one.trigger is not Trigger.CORPUS for one in due)


def _asked(one: RefreshAsked) -> str:
    return f"{one.principal}: {one.reason}" if one.reason else one.principal


def _corpus_due(
    change: CorpusChange, last: LastRefresh | None, now: datetime, rule: RefreshRule, waited: bool
) -> bool:
    if change.last_at is None:
        return waited
    settled = now - change.last_at >= rule.settle
    return settled and (waited or _since(change.last_at, last))


def _since(at: datetime, last: LastRefresh | None) -> bool:
    return last is None or at > last.at
