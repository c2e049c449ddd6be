"""CurationService: pauses and budgets of curation, what labels are worth, drift.

Why it exists: what an operator sets here is a row that curation and the workers read; nothing is sent to a process, so
it holds at once and after any restart. All figures are those that curation measured (``byline.drift.report``).
"""

# ruff: noqa: N802 - the methods have the names the protos give them.

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import Connection, text

from attribution.v1 import curation_service_pb2 as wire
from attribution.v1 import curation_service_pb2_grpc as rpc
from byline.db.session import transaction
from byline.drift.alarms import DriftAlarm, alarm_of, close_alarm
from byline.drift.report import DriftReport, LabelReport, drift_report, label_report
from byline.drift.windows import Mean, Window
from byline.errors import InvalidRequest
from byline.rankings.controls import SHARES, CurationControl, Spent, read_control, set_budget, set_paused, spent
from byline.rankings.controls import window_of as budget_window
from byline.rankings.curated import rankings_made
from byline.security.scopes import current_principal
from services.gateway import convert, names
from services.gateway.context import GatewayContext

T = TypeVar("T")
_FIGURES = ("queries_per_hour", *SHARES)
_WINDOWS, _MOST_WINDOWS = 14, 400
_SHORTEST = timedelta(minutes=1)


class CurationServicer(rpc.CurationServiceServicer):
    """The handlers of CurationService. ``now`` is the clock that windows end at."""

    def __init__(self, context: GatewayContext, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._context = context
        self._now = now

    async def GetCuration(self, request: wire.GetCurationRequest, context: Any) -> wire.Curation:
        """Whether curation runs, what it may spend and has spent."""
        return await self._changed(request.model, lambda connection, model_id: None)

    async def PauseCuration(self, request: wire.PauseCurationRequest, context: Any) -> wire.Curation:
        """Stop curation at once."""
        return await self._changed(request.model, lambda c, model: set_paused(c, model, True, request.reason[:500]))

    async def ResumeCuration(self, request: wire.ResumeCurationRequest, context: Any) -> wire.Curation:
        """End a pause."""
        return await self._changed(request.model, lambda c, model: set_paused(c, model, False, ""))

    async def SetCurationBudget(self, request: wire.SetCurationBudgetRequest, context: Any) -> wire.Curation:
        """Change the figures that are given."""
        changes: dict[str, float | None] = {
            name: getattr(request.budget, name) for name in _FIGURES if request.budget.HasField(name)
        }
        for name in request.reset:
            if name not in _FIGURES or name in changes:
                raise InvalidRequest("reset", f"names {name[:80]}, which is no figure of a budget or is given as well")
            changes[name] = None
        for name, value in changes.items():
            if value is not None and not math.isfinite(value):
                raise InvalidRequest(f"budget.{name}", "must be a finite number")
        if not changes:
            raise InvalidRequest("budget", "names no figure to change")
        return await self._changed(request.model, lambda c, model: set_budget(c, model, changes))

    async def GetLabelStatistics(self, request: wire.GetLabelStatisticsRequest, context: Any) -> wire.LabelStatistics:
        """How many labels there are, and what they are worth."""
        model_id = names.parse_model(request.model, "model")
        report = await self._read(model_id, lambda connection: label_report(connection, model_id, self._now()))
        return _labels(request.model, report)

    async def GetDrift(self, request: wire.GetDriftRequest, context: Any) -> wire.Drift:
        """Agreement by window and cluster, and alarms."""
        model_id = names.parse_model(request.model, "model")
        window = request.window.ToTimedelta() if request.HasField("window") else timedelta(days=1)
        most = request.windows or _WINDOWS
        if not _SHORTEST <= window <= timedelta(days=366):
            raise InvalidRequest("window", "must be a minute to a year", value=window)
        if not 1 <= most <= _MOST_WINDOWS:
            raise InvalidRequest("windows", f"must be 1 to {_MOST_WINDOWS}", value=most)
        report = await self._read(
            model_id,
            lambda connection: drift_report(
                connection, model_id, self._now(), window, most, live=not request.curated
            ),
        )
        return _drift(request.model, report)

    async def CloseDriftAlarm(self, request: wire.CloseDriftAlarmRequest, context: Any) -> wire.DriftAlarm:
        """Close an alarm."""
        model_id = names.parse_model(request.model, "model")
        who = current_principal().name + (f": {request.reason[:300]}" if request.reason else "")

        def close(connection: Connection) -> DriftAlarm:
            found = alarm_of(connection, model_id, request.id)
            if found is None:
                raise InvalidRequest("id", f"names no alarm of {request.model}", value=request.id)
            close_alarm(connection, found.id, who)
            return alarm_of(connection, model_id, request.id) or found

        return _alarm(await self._read(model_id, close))

    async def _changed(self, model: str, change: Callable[[Connection, str], object]) -> wire.Curation:
        model_id = names.parse_model(model, "model")

        def work(connection: Connection) -> wire.Curation:
            change(connection, model_id)
            control = read_control(connection, model_id)
            used = spent(connection, model_id, budget_window(control, 1))
            message = _curation(model, control, used, _waiting(connection, model_id))
            message.rankings = rankings_made(connection, model_id)
            message.max_rankings = self._context.limits.max_rankings
            return message

        return await self._read(model_id, work)

    async def _read(self, model_id: str, work: Callable[[Connection], T]) -> T:
        """In one transaction. ModelNotFound for a model that is not registered."""

        def run() -> T:
            self._context.catalog.model(model_id)
            with transaction(self._context.engine) as connection:
                return work(connection)

        return await self._context.offload(run)


def _waiting(connection: Connection, model_id: str) -> Mapping[str, int]:
    row = connection.execute(text("""
        SELECT (SELECT count(*) FROM jobs WHERE stage = 'rank' AND state IN ('QUEUED', 'RUNNING', 'CANCELLING')
                AND model_id = :model) AS open_jobs,
            (SELECT count(*) FROM live_intake WHERE model_id = :model AND state = 'waiting') AS waiting_samples
    """), {"model": model_id}).mappings().one()  # fmt: skip
    return {name: int(row[name]) for name in ("open_jobs", "waiting_samples")}


def _curation(model: str, control: CurationControl, used: Spent, waiting: Mapping[str, int]) -> wire.Curation:
    message = wire.Curation(
        model=model, paused=control.paused, reason=control.reason, window_queries=used.queries, workers=used.workers,
        update_time=convert.timestamp(control.updated_at), **waiting,
        budget=wire.CurationBudget(
            queries_per_hour=control.queries_per_hour, **{name: getattr(control, name) for name in SHARES}
        ),
    )  # fmt: skip
    message.window.FromTimedelta(used.window)
    message.window_worker_time.FromTimedelta(timedelta(seconds=used.worker_seconds))
    return message


def _labels(model: str, report: LabelReport) -> wire.LabelStatistics:
    counts = report.counts
    return wire.LabelStatistics(
        model=model, by_split=counts.by_split, by_source=counts.by_source, by_purpose=counts.by_purpose,
        by_teacher=counts.by_teacher, repeat_overlap=_estimate(report.repeat_overlap),
        repeat_spearman=_estimate(report.repeat_spearman), pruning_loss=_estimate(report.lost),
        missed_items=_estimate(report.missed),
    )  # fmt: skip


def _drift(model: str, report: DriftReport) -> wire.Drift:
    return wire.Drift(
        model=model, windows=[_window(window) for window in report.windows], cluster_examples=report.examples,
        alarms=[_alarm(alarm) for alarm in report.alarms],
    )  # fmt: skip


def _window(window: Window) -> wire.DriftWindow:
    return wire.DriftWindow(
        start_time=convert.timestamp(window.start), end_time=convert.timestamp(window.end), cluster=window.cluster,
        queries=window.queries, overlap=_estimate(window.overlap), spearman=_estimate(window.spearman),
        calibration=_estimate(window.calibration),
    )  # fmt: skip


def _alarm(alarm: DriftAlarm) -> wire.DriftAlarm:
    return wire.DriftAlarm(
        id=alarm.id, raise_time=convert.timestamp(alarm.raised_at), reason=alarm.reason,
        close_time=convert.timestamp(alarm.closed_at), closed_by=alarm.closed_by or "",
    )  # fmt: skip


def _estimate(mean: Mean) -> wire.Estimate:
    """NaN and infinity stay absent: JSON has neither."""
    known = {name: value for name in ("value", "low", "high") if math.isfinite(value := getattr(mean, name))}
    return wire.Estimate(queries=mean.n, **known)
