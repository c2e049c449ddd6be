"""What an operator allows curation to do: paused or not, how many queries an hour, which share of the workers.

Why it exists: pauses and budgets are given through the API, must hold at once, and outlive every process. They are
one row for a model; the gateway writes it, curation and the workers that rank read it. The waiting ranking jobs of a
paused model are put off far into the future in the same transaction, so that no worker begins one afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Table, func, select, text
from sqlalchemy.dialects.postgresql import insert

from byline.db.curation_models import CurationControlRow
from byline.drift.alarms import notify
from byline.errors import InvalidRequest

CONTROLS: Table = CurationControlRow.metadata.tables["curation_controls"]
#: When a held job is due: never, in a form that every driver can read.
_HELD = datetime(2200, 1, 1, tzinfo=UTC)
#: The windows over which budgets are counted: not so short that a batch breaks them, nor so long that all of a day's
#: queries could come at once.
SHORTEST_WINDOW = timedelta(minutes=10)
SHARES = ("gpu_share", "uniform_share", "repeat_share", "drift_share")


@dataclass(frozen=True)
class CurationControl:
    """What holds for one model now. ``queries_per_hour`` None: as many as the workers manage.

    ``gpu_share``: of the verification workers' time, measured over ten minutes; ``uniform_share`` of the queries chosen
    by chance alone; ``repeat_share`` of the labels made twice; ``drift_share`` of the opted-in lookups that the teacher
    checks.
    """

    paused: bool = False
    queries_per_hour: float | None = None
    gpu_share: float = 1.0
    uniform_share: float = 0.2
    repeat_share: float = 0.05
    drift_share: float = 0.02
    reason: str = ""
    updated_at: datetime | None = None


def read_control(connection: Connection, model_id: str) -> CurationControl:
    """The model's control; the defaults where nobody has set anything."""
    row = connection.execute(select(CONTROLS).where(CONTROLS.c.model_id == model_id)).mappings().first()
    names = {field.name for field in fields(CurationControl)}
    given = {} if row is None else {name: row[name] for name in names if row[name] is not None}
    return CurationControl(**given)


def set_paused(connection: Connection, model_id: str, paused: bool, reason: str) -> CurationControl:
    """Pause or resume, in the caller's transaction: no query is chosen and no ranking begun until resumed."""
    _upsert(connection, model_id, {"paused": paused, "reason": reason})
    if paused:
        hold_rankings(connection, model_id)
    else:
        release_rankings(connection, model_id)
    return read_control(connection, model_id)


def set_budget(connection: Connection, model_id: str, changes: Mapping[str, float | None]) -> CurationControl:
    """Change the figures named in ``changes``, None back to its default. Raises ``InvalidRequest``."""
    for name, value in changes.items():
        if name in SHARES and value is not None and not 0.0 <= value <= 1.0:
            raise InvalidRequest(name, "must be between 0 and 1", value=value)
        if name == "queries_per_hour" and value is not None and not 0.0 <= value <= 1e6:
            raise InvalidRequest(name, "must be between 0 and 1,000,000", value=value)
        if name not in (*SHARES, "queries_per_hour"):
            raise InvalidRequest(name, "is no figure of a budget")
    _upsert(connection, model_id, dict(changes))
    return read_control(connection, model_id)


def hold_rankings(connection: Connection, model_id: str) -> int:
    """Put off the model's waiting ranking jobs until it is resumed; returns how many."""
    statement = text(
        "UPDATE jobs SET next_attempt_at = :held, dispatched_at = NULL WHERE stage = 'rank' AND state = 'QUEUED' "
        "AND model_id = :model AND next_attempt_at IS DISTINCT FROM :held"
    )
    return connection.execute(statement, {"held": _HELD, "model": model_id}).rowcount


def release_rankings(connection: Connection, model_id: str) -> int:
    """Let the model's held ranking jobs be begun again; returns how many."""
    statement = text(
        "UPDATE jobs SET next_attempt_at = NULL, dispatched_at = NULL WHERE stage = 'rank' AND state = 'QUEUED' "
        "AND model_id = :model AND next_attempt_at = :held"
    )
    return connection.execute(statement, {"held": _HELD, "model": model_id}).rowcount


def is_paused(connection: Connection, model_id: str) -> bool:
    """Whether curation of the model is paused."""
    found = connection.execute(select(CONTROLS.c.paused).where(CONTROLS.c.model_id == model_id)).scalar()
    return bool(found)


@dataclass(frozen=True)
class Spent:
    """What curation used in the last window: queries asked of workers, and seconds of workers by workers."""

    queries: int
    worker_seconds: float
    workers: int
    window: timedelta


def window_of(control: CurationControl, batch: int) -> timedelta:
    """The time over which the budget is counted: long enough for one batch at the rate that is allowed."""
    rate = control.queries_per_hour
    if not rate:
        return SHORTEST_WINDOW
    return max(SHORTEST_WINDOW, timedelta(hours=batch / rate))


def spent(connection: Connection, model_id: str, window: timedelta) -> Spent:
    """What was used since ``window`` ago, by the database's clock."""
    parameters: dict[str, Any] = {"model": model_id, "seconds": window.total_seconds()}
    queries = connection.execute(text("""
        SELECT count(*) FROM job_queries q JOIN jobs j ON j.id = q.job_id
        WHERE j.kind = 'ranking' AND j.model_id = :model AND j.create_time > now() - make_interval(secs => :seconds)
    """), parameters).scalar_one()  # fmt: skip
    # Also what began before the window and ended in it, but only since then; what runs still, until now.
    seconds = connection.execute(text("""
        WITH spans AS (
            SELECT e.to_state, greatest(e.at, now() - make_interval(secs => :seconds)) AS began,
                coalesce(lead(e.at) OVER (PARTITION BY e.job_id ORDER BY e.id), now()) AS ended
            FROM job_events e JOIN jobs j ON j.id = e.job_id AND j.model_id = :model
            WHERE e.stage = 'rank' AND e.at > now() - make_interval(secs => 2 * :seconds)
        )
        SELECT coalesce(sum(extract(epoch FROM ended - began)) FILTER (WHERE to_state = 'RUNNING' AND ended > began), 0)
        FROM spans
    """), parameters).scalar_one()  # fmt: skip
    workers = connection.execute(text("""
        SELECT count(*) FROM worker_reports WHERE queue = 'verification' AND last_seen > now() - interval '5 minutes'
    """)).scalar_one()
    return Spent(int(queries), float(seconds), int(workers), window)


def allowance(control: CurationControl, used: Spent, batch: int) -> int:
    """How many queries may be asked for now, at most ``batch``; 0 while paused or the budget is spent."""
    if control.paused:
        return 0
    if control.gpu_share <= 0 or used.worker_seconds > control.gpu_share * max(used.workers, 1) * (
        used.window.total_seconds()
    ):
        return 0
    if control.queries_per_hour is None:
        return batch
    allowed = control.queries_per_hour * used.window.total_seconds() / 3600.0
    return max(0, min(batch, int(allowed + 1e-9) - used.queries))


def _upsert(connection: Connection, model_id: str, values: Mapping[str, Any]) -> None:
    changed = {**values, "updated_at": func.now()}
    statement = insert(CONTROLS).values(model_id=model_id, **values)
    connection.execute(statement.on_conflict_do_update(index_elements=["model_id"], set_=changed))
    notify(connection, model_id)
