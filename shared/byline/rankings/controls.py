"""What an operator allows curation to do: paused or not, how many queries an hour, which share of the workers.

Why it exists: pauses and budgets are given through the API, must hold at once, and outlive every process. They are
one row for a model; the gateway writes it, curation and the workers that rank read it. The waiting ranking jobs of a
paused model are put off far into the future in the same transaction, so that no worker begins one afterwards. Whoever
makes a ranking job takes its turn with whoever pauses (:func:`take_turn`), so that none slips in between.
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

#: Ranking jobs belong to no client; quotas and listings of clients never see them.
PROJECT = "byline-curation"
CONTROLS: Table = CurationControlRow.metadata.tables["curation_controls"]
#: When a held job is due: never, in a form that every driver can read.
_HELD = datetime(2200, 1, 1, tzinfo=UTC)
#: The window over which queries an hour are counted: not so short that a batch breaks it, nor so long that all of a
#: day's queries could come at once.
SHORTEST_WINDOW = timedelta(minutes=10)
#: What was asked for longer ago is paid for.
_LONGEST = timedelta(days=30)
_LOCK = 0x63757261  # "cura" in ASCII
SHARES = ("gpu_share", "uniform_share", "repeat_share", "drift_share")


@dataclass(frozen=True)
class CurationControl:
    """What holds for one model now. ``queries_per_hour`` None: as many as the workers manage.

    ``gpu_share``: of the verification workers' time, from batch to batch; ``uniform_share`` of the queries chosen
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
    take_turn(connection)
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


def take_turn(connection: Connection) -> None:
    """One at a time, until the caller's transaction ends: makers of ranking jobs, and whoever pauses or resumes."""
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})


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
    """What curation used in the last window: queries asked of workers, and seconds of workers by workers.

    ``asked_s``: seconds since it asked for anything (None: not lately), and ``since_asked`` the seconds of workers that
    its rankings took since then.
    """

    queries: int
    worker_seconds: float
    workers: int
    window: timedelta
    asked_s: float | None = None
    since_asked: float = 0.0


def window_of(control: CurationControl, batch: int) -> timedelta:
    """The time over which queries an hour are counted: long enough for one batch at the rate that is allowed."""
    rate = control.queries_per_hour
    if not rate:
        return SHORTEST_WINDOW
    return max(SHORTEST_WINDOW, timedelta(hours=batch / rate))


_COUNTED = text("""
    SELECT (SELECT count(*) FROM job_queries q JOIN jobs j ON j.id = q.job_id
            WHERE j.project_id = :project AND j.model_id = :model
                AND j.create_time > now() - make_interval(secs => :seconds)
        ) AS queries,
        (SELECT count(*) FROM worker_reports WHERE queue = 'verification' AND last_seen > now() - interval '5 minutes'
        ) AS workers,
        (SELECT extract(epoch FROM now() - max(j.create_time)) FROM jobs j
            WHERE j.project_id = :project AND j.model_id = :model
                AND j.create_time > now() - make_interval(secs => :longest)
        ) AS asked_s
""")
# Of each job that did anything since then, and of each that runs: its whole history, however long ago it began.
_WORKED = text("""
    WITH touched AS (
        SELECT job_id FROM job_events WHERE stage = 'rank' AND at > now() - make_interval(secs => :seconds)
        UNION SELECT id FROM jobs WHERE stage = 'rank' AND state IN ('RUNNING', 'CANCELLING')
    ), spans AS (
        SELECT e.to_state, greatest(e.at, now() - make_interval(secs => :seconds)) AS began,
            coalesce(lead(e.at) OVER (PARTITION BY e.job_id ORDER BY e.id), now()) AS ended
        FROM touched t JOIN jobs j ON j.id = t.job_id AND j.model_id = :model JOIN job_events e ON e.job_id = j.id
        WHERE e.stage = 'rank'
    )
    SELECT coalesce(sum(extract(epoch FROM ended - began)) FILTER (WHERE to_state = 'RUNNING' AND ended > began), 0)
    FROM spans
""")


def spent(connection: Connection, model_id: str, window: timedelta) -> Spent:
    """What was used since ``window`` ago, and since something was asked for last, by the database's clock."""
    parameters = {"project": PROJECT, "model": model_id, "seconds": window.total_seconds(),
                  "longest": _LONGEST.total_seconds()}  # fmt: skip
    row = connection.execute(_COUNTED, parameters).one()
    asked_s = None if row.asked_s is None else float(row.asked_s)
    return Spent(
        int(row.queries), _worked(connection, model_id, window.total_seconds()), int(row.workers), window, asked_s,
        0.0 if asked_s is None else _worked(connection, model_id, asked_s),
    )  # fmt: skip


def allowance(control: CurationControl, used: Spent, batch: int) -> int:
    """How many queries may be asked for now, at most ``batch``; 0 while paused or the budget is spent.

    Nobody knows beforehand how long a batch will run. So its time is saved up afterwards: the next one waits until what
    rankings took since the last was asked for is no more than the share of the time that has passed. Every time between
    two batches then keeps the share, and so does any sum of them, however long one runs.
    """
    if control.paused or control.gpu_share <= 0:
        return 0
    if control.gpu_share < 1 and used.asked_s is not None and (
        used.since_asked > control.gpu_share * max(used.workers, 1) * used.asked_s
    ):
        return 0
    if control.queries_per_hour is None:
        return batch
    allowed = control.queries_per_hour * used.window.total_seconds() / 3600.0
    return max(0, min(batch, int(allowed + 1e-9) - used.queries))


def _worked(connection: Connection, model_id: str, seconds: float) -> float:
    return float(connection.execute(_WORKED, {"model": model_id, "seconds": seconds}).scalar_one())


def _upsert(connection: Connection, model_id: str, values: Mapping[str, Any]) -> None:
    changed = {**values, "updated_at": func.now()}
    statement = insert(CONTROLS).values(model_id=model_id, **values)
    connection.execute(statement.on_conflict_do_update(index_elements=["model_id"], set_=changed))
    notify(connection, model_id)
