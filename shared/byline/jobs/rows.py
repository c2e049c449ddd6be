"""Reading and writing rows of the job tables: the only module that maps rows to ``byline.jobs.model``.

Why it exists: the modules beside it (admission, leases, outbox, dead) each hold one concern of the store and
share these few statements. Every change of state goes through ``change``, which checks the transition
table and writes the event, so no path can forget either. All functions work inside the caller's transaction.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Float, RowMapping, Table, TextualSelect, column, func, insert, text, update

from byline.db.models import JobEventRow, JobQueryRow, JobResultRow, JobRow
from byline.errors import AttemptsExhausted, BylineError
from byline.jobs.model import Claim, Job, JobEvent, StageResult, unpack_embedding
from byline.jobs.states import Kind, Stage, State, Tier, Verification, check_transition

JOBS: Table = JobRow.metadata.tables["jobs"]
RESULTS: Table = JobResultRow.metadata.tables["job_results"]
EVENTS: Table = JobEventRow.metadata.tables["job_events"]
JOB_QUERIES: Table = JobQueryRow.metadata.tables["job_queries"]

#: Columns that a job has only while a worker holds it.
NO_LEASE: Mapping[str, Any] = {"lease_owner": None, "lease_until": None}


#: All columns of a job, for statements that are text.
COLUMNS = ", ".join(JOBS.c.keys())


#: The release to pin to a job that has none: one for every job; by model, which also says that jobs of other models are
#: not to be taken (a model with None: taken, not pinned); or none.
Pins = str | Mapping[str, str | None] | None


def pinning(release_id: Pins) -> dict[str, str | None]:
    """The parameters ``release`` and ``pins`` of a claim."""
    if release_id is None or isinstance(release_id, str):
        return {"release": release_id, "pins": None}
    return {"release": None, "pins": json.dumps(dict(release_id))}


def selecting_jobs(sql: str) -> TextualSelect:
    """A statement whose last SELECT gives ``COLUMNS``. That it says so spares looking at each result's columns."""
    return text(sql).columns(*JOBS.c)


#: Seconds a claimed job had waited, for the last SELECT of a claim; ``since`` is when it began to.
WAITED = "GREATEST(EXTRACT(epoch FROM now() - since), 0)::float8 AS waited_s"


def claiming_jobs(sql: str) -> TextualSelect:
    """As ``selecting_jobs``, for a statement that gives ``COLUMNS`` and ``WAITED``."""
    return text(sql).columns(*JOBS.c, column("waited_s", Float))


_FIND = selecting_jobs(f"SELECT {COLUMNS} FROM jobs WHERE id = :id")  # noqa: S608
_FIND_LOCKED = selecting_jobs(f"SELECT {COLUMNS} FROM jobs WHERE id = :id FOR UPDATE")  # noqa: S608
_FIND_WITH_RESULTS = text(
    f"SELECT {', '.join('j.' + name for name in JOBS.c.keys())}, r.stage, r.release_id, r.fence, r.result, r.created_at"  # noqa: S608
    " FROM jobs j LEFT JOIN job_results r ON r.job_id = j.id WHERE j.id = :id ORDER BY r.created_at"
).columns(
    *JOBS.c, RESULTS.c.stage, RESULTS.c.release_id, RESULTS.c.fence, RESULTS.c.result, RESULTS.c.created_at
)
_RESULTS = text(
    "SELECT stage, release_id, fence, result, created_at FROM job_results WHERE job_id = :id ORDER BY created_at"
).columns(RESULTS.c.stage, RESULTS.c.release_id, RESULTS.c.fence, RESULTS.c.result, RESULTS.c.created_at)


def to_job(row: Mapping[str, Any] | RowMapping) -> Job:
    """A row of ``jobs`` (all columns) as a value."""
    values = dict(row)
    values["kind"] = Kind(row["kind"])
    values["tier"] = Tier(row["tier"])
    values["verification"] = Verification(row["verification"])
    values["state"] = State(row["state"])
    values["stage"] = Stage(row["stage"])
    values["embedding"] = None if row["embedding"] is None else unpack_embedding(row["embedding"])
    return Job(**values)


def to_claim(row: RowMapping, worker_id: str) -> Claim:
    """A row of a claim (``COLUMNS`` and ``WAITED``) as a value."""
    values = dict(row)
    waited_s = float(values.pop("waited_s"))
    job = to_job(values)
    return Claim(job=job, stage=job.stage, fence=job.fence, worker_id=worker_id, waited_s=waited_s)


def to_event(row: RowMapping) -> JobEvent:
    """A row of ``job_events`` as a value."""
    return JobEvent(
        at=row["at"],
        from_state=None if row["from_state"] is None else State(row["from_state"]),
        to_state=State(row["to_state"]),
        stage=Stage(row["stage"]),
        actor=row["actor"],
        fence=row["fence"],
        reason=row["reason"],
    )


def to_result(row: Mapping[str, Any] | RowMapping) -> StageResult:
    """A row of ``job_results`` as a value."""
    return StageResult(
        stage=Stage(row["stage"]),
        release_id=row["release_id"],
        fence=row["fence"],
        result=row["result"],
        created_at=row["created_at"],
    )


def find(connection: Connection, job_id: uuid.UUID, *, lock: bool = False) -> Job | None:
    """The job, row-locked until the transaction ends if ``lock``."""
    row = connection.execute(_FIND_LOCKED if lock else _FIND, {"id": job_id}).mappings().first()
    return None if row is None else to_job(row)


def results_of(connection: Connection, job_id: uuid.UUID) -> list[StageResult]:
    """What the finished stages of a job found, in their order."""
    return [to_result(row) for row in connection.execute(_RESULTS, {"id": job_id}).mappings()]


def find_with_results(connection: Connection, job_id: uuid.UUID) -> tuple[Job, list[StageResult]] | None:
    """The job with what its finished stages found, in their order, by one statement."""
    rows = connection.execute(_FIND_WITH_RESULTS, {"id": job_id}).all()
    if not rows:
        return None
    width = len(JOBS.c)
    job = to_job(dict(zip(JOBS.c.keys(), rows[0][:width], strict=True)))
    names = ("stage", "release_id", "fence", "result", "created_at")
    return job, [to_result(dict(zip(names, row[width:], strict=True))) for row in rows if row[width] is not None]


def add_event(connection: Connection, job: Job, before: State | None, *, stage: Stage, actor: str, reason: str) -> None:
    """Record that ``job`` (as it is now) came from ``before`` while in ``stage``."""
    connection.execute(
        insert(EVENTS).values(
            job_id=job.id,
            from_state=before,
            to_state=job.state,
            stage=stage,
            actor=actor,
            fence=job.fence,
            reason=reason,
        )
    )


def change(connection: Connection, job: Job, to: State, *, actor: str, reason: str, **values: object) -> Job:
    """Change a job whose row the caller has locked; ``values`` are further columns. Writes the event.

    Raises ``IllegalTransition`` if the table forbids it. A terminal state drops the lease and sets ``end_time``.
    """
    check_transition(job.state, to)
    columns: dict[str, object] = {"state": to, **values}
    if to in (State.SUCCEEDED, State.FAILED, State.CANCELLED):
        columns |= {**NO_LEASE, "end_time": func.now(), "next_attempt_at": None, "dispatched_at": None}
    statement = update(JOBS).where(JOBS.c.id == job.id).values(columns).returning(*JOBS.c)
    changed = to_job(connection.execute(statement).mappings().one())
    add_event(connection, changed, job.state, stage=job.stage, actor=actor, reason=reason)
    return changed


def add_result(connection: Connection, job: Job, result: Mapping[str, Any]) -> None:
    """Write what the job's current stage found; the primary key refuses a second one."""
    connection.execute(
        insert(RESULTS).values(
            job_id=job.id, stage=job.stage, release_id=job.release_id, fence=job.fence, result=dict(result)
        )
    )


def requeue(connection: Connection, job: Job, *, actor: str, reason: str, delay_s: float, **values: object) -> Job:
    """Put a locked RUNNING job back into the queue, due again after ``delay_s`` seconds."""
    due = func.now() + func.make_interval(0, 0, 0, 0, 0, 0, delay_s) if delay_s > 0 else None
    return change(
        connection,
        job,
        State.QUEUED,
        actor=actor,
        reason=reason,
        next_attempt_at=due,
        dispatched_at=None,
        **NO_LEASE,
        **values,
    )


def end_failed(connection: Connection, job: Job, error: BylineError, *, actor: str) -> Job:
    """End a locked job that cannot go on.

    FAILED, except that a job whose client said verification is BEST_EFFORT and whose lookup succeeded is
    SUCCEEDED: the slow stage's result row then holds ``verification_error`` and nothing else of a result.
    """
    stored = error.to_json()
    optional = job.kind is Kind.ATTRIBUTION and job.stage is not Stage.LOOKUP
    if optional and job.verification is Verification.BEST_EFFORT:
        add_result(
            connection,
            job,
            {"tier": Tier.RETRIEVED.value, "release_id": job.release_id, "verification_error": stored},
        )
        return change(connection, job, State.SUCCEEDED, actor=actor, reason=error.reason, error=None)
    return change(connection, job, State.FAILED, actor=actor, reason=error.reason, error=stored)


def exhausted(job: Job, cause: str, last: str) -> AttemptsExhausted:
    """The error of a job that used up its attempts; ``cause`` is the reason of the last failure."""
    return AttemptsExhausted(
        f"stage {job.stage} failed {job.attempt} times, most recently: {last}",
        stage=job.stage,
        attempts=job.attempt,
        last_reason=cause,
    )
