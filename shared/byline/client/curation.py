"""The client of those who watch over labels: curation's pause and budget, statistics of labels, drift.

Why it exists: few need these calls, so they stand beside the client that everybody uses.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from attribution.v1 import curation_service_pb2 as wire_messages
from attribution.v1 import curation_service_pb2_grpc
from byline.client.calls import Call
from byline.client.sync import Client

_SERVICE = "CurationService"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over ``queries`` with its 95 % interval; None where too few were measured."""

    value: float | None
    low: float | None
    high: float | None
    queries: int


@dataclass(frozen=True, slots=True)
class Curation:
    """Curation of one model. ``queries_per_hour`` None: as many as the workers manage; shares 0 to 1."""

    model: str
    paused: bool
    reason: str
    queries_per_hour: float | None
    gpu_share: float
    uniform_share: float
    repeat_share: float
    drift_share: float
    window_s: float
    window_queries: int
    window_worker_s: float
    workers: int
    open_jobs: int
    waiting_samples: int
    update_time: datetime | None
    rankings: int
    #: From so many rankings on nothing is asked; 0: no limit.
    max_rankings: int


@dataclass(frozen=True, slots=True)
class LabelStatistics:
    """How many labels there are and what they are worth."""

    model: str
    by_split: Mapping[str, int]
    by_source: Mapping[str, int]
    by_purpose: Mapping[str, int]
    by_teacher: Mapping[str, int]
    repeat_overlap: Estimate
    repeat_spearman: Estimate
    pruning_loss: Estimate
    missed_items: Estimate


@dataclass(frozen=True, slots=True)
class DriftWindow:
    """Agreement in one window; ``cluster`` None: of all queries."""

    start: datetime
    end: datetime
    cluster: int | None
    queries: int
    overlap: Estimate
    spearman: Estimate
    calibration: Estimate


@dataclass(frozen=True, slots=True)
class DriftAlarm:
    """Agreement fell. ``closed`` None: it is open."""

    id: int
    raised: datetime
    reason: str
    closed: datetime | None
    closed_by: str


@dataclass(frozen=True, slots=True)
class Drift:
    """Windows and alarms, latest first; ``examples``: a prompt of each cluster, by its number."""

    model: str
    windows: Sequence[DriftWindow]
    examples: Sequence[str]
    alarms: Sequence[DriftAlarm]


class CurationClient(Client):
    """A ``Client`` that can look after labels, too. ``model`` is an id."""

    def __init__(self, address: str, project: str = "default", *, timeout: float = 30.0,
                 credentials: grpc.ChannelCredentials | None = None, api_key: str = "") -> None:
        super().__init__(address, project, timeout=timeout, credentials=credentials, api_key=api_key)
        self._stubs[_SERVICE] = curation_service_pb2_grpc.CurationServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def curation(self, model: str) -> Curation:
        """Whether curation runs, what it may spend and has spent."""
        request = wire_messages.GetCurationRequest(model=f"models/{model}")
        return self._do(Call(_SERVICE, "GetCuration", request, _curation))

    def pause_curation(self, model: str, reason: str = "") -> Curation:
        """Stop curation at once; outlives restarts."""
        request = wire_messages.PauseCurationRequest(model=f"models/{model}", reason=reason)
        return self._do(Call(_SERVICE, "PauseCuration", request, _curation))

    def resume_curation(self, model: str) -> Curation:
        """End a pause."""
        request = wire_messages.ResumeCurationRequest(model=f"models/{model}")
        return self._do(Call(_SERVICE, "ResumeCuration", request, _curation))

    def set_budget(self, model: str, changes: Mapping[str, float], reset: Collection[str] = ()) -> Curation:
        """Change figures of the budget by name (``Curation``); those in ``reset`` go back to their defaults."""
        request = wire_messages.SetCurationBudgetRequest(
            model=f"models/{model}", budget=wire_messages.CurationBudget(**changes), reset=list(reset)
        )
        return self._do(Call(_SERVICE, "SetCurationBudget", request, _curation))

    def label_statistics(self, model: str) -> LabelStatistics:
        """How many labels there are and what they are worth."""
        request = wire_messages.GetLabelStatisticsRequest(model=f"models/{model}")
        return self._do(Call(_SERVICE, "GetLabelStatistics", request, _labels))

    def drift(self, model: str, window: timedelta = timedelta(days=1), windows: int = 14, *, curated: bool = False
              ) -> Drift:
        """Agreement of student and teacher on live queries (``curated``: on curation's uniform ones)."""
        length = Duration()
        length.FromTimedelta(window)
        request = wire_messages.GetDriftRequest(
            model=f"models/{model}", window=length, windows=windows, curated=curated
        )
        return self._do(Call(_SERVICE, "GetDrift", request, _drift))

    def close_alarm(self, model: str, alarm_id: int, reason: str = "") -> DriftAlarm:
        """Close an alarm that has been dealt with."""
        request = wire_messages.CloseDriftAlarmRequest(model=f"models/{model}", id=alarm_id, reason=reason)
        return self._do(Call(_SERVICE, "CloseDriftAlarm", request, _alarm))


def _curation(message: wire_messages.Curation) -> Curation:
    budget = message.budget
    return Curation(
        message.model.rpartition("/")[2], message.paused, message.reason,
        budget.queries_per_hour if budget.HasField("queries_per_hour") else None,
        budget.gpu_share, budget.uniform_share, budget.repeat_share, budget.drift_share,
        message.window.ToTimedelta().total_seconds(), message.window_queries,
        message.window_worker_time.ToTimedelta().total_seconds(), message.workers, message.open_jobs,
        message.waiting_samples, _time(message, "update_time"), message.rankings, message.max_rankings,
    )  # fmt: skip


def _labels(message: wire_messages.LabelStatistics) -> LabelStatistics:
    return LabelStatistics(
        message.model.rpartition("/")[2], dict(message.by_split), dict(message.by_source), dict(message.by_purpose),
        dict(message.by_teacher), _estimate(message.repeat_overlap), _estimate(message.repeat_spearman),
        _estimate(message.pruning_loss), _estimate(message.missed_items),
    )  # fmt: skip


def _drift(message: wire_messages.Drift) -> Drift:
    windows = [
        DriftWindow(
            one.start_time.ToDatetime(UTC), one.end_time.ToDatetime(UTC),
            one.cluster if one.HasField("cluster") else None, one.queries, _estimate(one.overlap),
            _estimate(one.spearman), _estimate(one.calibration),
        )
        for one in message.windows
    ]  # fmt: skip
    return Drift(message.model.rpartition("/")[2], windows, list(message.cluster_examples),
                 [_alarm(alarm) for alarm in message.alarms])


def _alarm(message: wire_messages.DriftAlarm) -> DriftAlarm:
    return DriftAlarm(message.id, message.raise_time.ToDatetime(UTC), message.reason, _time(message, "close_time"),
                      message.closed_by)


def _estimate(message: wire_messages.Estimate) -> Estimate:
    value, low, high = (getattr(message, name) if message.HasField(name) else None for name in ("value", "low", "high"))
    return Estimate(value, low, high, message.queries)


def _time(message: Any, field: str) -> datetime | None:
    found: datetime | None = getattr(message, field).ToDatetime(UTC) if message.HasField(field) else None
    return found
