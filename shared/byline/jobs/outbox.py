"""The dispatcher's side: which doorbells to ring, whose lease or time ran out, how deep the queues are.

Why it exists: a QUEUED row *is* the message that waits to be sent, so what Redis loses is sent again from
here. Few messages are out at a time (``in_flight`` a stage), chosen in turn from each project: one
project's backlog delays only itself, and pausing or cancelling queued work never touches Redis. Any number
of dispatchers may run: rows are taken with SKIP LOCKED.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, select, text

from byline.errors import DeadlineExceeded, LeaseExpired
from byline.jobs.leases import retry_or_end
from byline.jobs.model import Job
from byline.jobs.rows import JOBS, change, end_failed, to_job
from byline.jobs.states import Stage, State

_DISPATCHER = "dispatcher"


@dataclass(frozen=True)
class Doorbell:
    """A message to send: this job's stage wants a worker."""

    job_id: uuid.UUID
    stage: Stage


@dataclass(frozen=True, kw_only=True)
class StageDepth:
    """How a stage stands: jobs by state, of the queued ones how many have a doorbell out, longest wait."""

    stage: Stage
    queued: int
    running: int
    dispatched: int
    oldest_wait_s: float
    paused: bool


# Refilled only when half of a stage's doorbells were answered: the backlog is sorted once for many sends.
_DUE = text("""
WITH limits AS (
    SELECT * FROM unnest(CAST(:stages AS text[]), CAST(:bounds AS int[]), CAST(:again AS float8[]),
        CAST(:grace AS float8[])) AS l(stage, in_flight, again_s, grace_s)
    WHERE NOT EXISTS (SELECT 1 FROM stage_controls c WHERE c.stage = l.stage AND c.paused)
), room AS (
    SELECT l.stage, l.again_s, l.grace_s, l.in_flight - out.n AS room FROM limits l, LATERAL (
        SELECT count(*) AS n FROM jobs j WHERE j.stage = l.stage AND j.state = 'QUEUED'
            AND j.dispatched_at >= now() - make_interval(secs => l.again_s)
    ) AS out
    WHERE out.n * 2 <= l.in_flight
), turns AS (
    SELECT j.id, j.stage, j.create_time, r.room, j.turn FROM room r, LATERAL (
        SELECT id, stage, create_time, row_number() OVER (PARTITION BY project_id ORDER BY create_time, id) AS turn
        FROM jobs WHERE stage = r.stage AND state = 'QUEUED' AND (next_attempt_at IS NULL OR next_attempt_at <= now())
            AND (dispatched_at IS NULL OR dispatched_at < now() - make_interval(secs => r.again_s))
            AND (attempt > 0 OR update_time <= now() - make_interval(secs => r.grace_s))
    ) AS j
), places AS (
    SELECT id, room, row_number() OVER (PARTITION BY stage ORDER BY turn, create_time, id) AS place FROM turns
), picked AS (
    SELECT j.id, p.place FROM jobs j JOIN places p USING (id)
    WHERE p.place <= p.room AND j.state = 'QUEUED' ORDER BY p.place FOR UPDATE OF j SKIP LOCKED
)
UPDATE jobs SET dispatched_at = now() FROM picked WHERE jobs.id = picked.id
RETURNING jobs.id, jobs.stage, picked.place, set_config('synchronous_commit', 'off', true)
""")

_DEPTHS = text("""
SELECT s.stage,
    count(*) FILTER (WHERE j.state = 'QUEUED') AS queued,
    count(*) FILTER (WHERE j.state IN ('RUNNING', 'CANCELLING')) AS running,
    count(*) FILTER (WHERE j.state = 'QUEUED' AND j.dispatched_at IS NOT NULL) AS dispatched,
    COALESCE(EXTRACT(epoch FROM now() - min(j.update_time) FILTER (WHERE j.state = 'QUEUED')), 0) AS wait,
    COALESCE((SELECT paused FROM stage_controls c WHERE c.stage = s.stage), false) AS paused
FROM unnest(CAST(:stages AS text[])) AS s(stage)
LEFT JOIN jobs j ON j.stage = s.stage AND j.state IN ('QUEUED', 'RUNNING', 'CANCELLING')
GROUP BY s.stage
""")


def take_due(
    connection: Connection,
    in_flight: Mapping[Stage, int],
    again_s: Mapping[Stage, float],
    grace_s: Mapping[Stage, float],
) -> list[Doorbell]:
    """Mark as dispatched, and return in fair order, the jobs whose doorbell is to be rung now.

    Short stages before long ones (the order of ``Stage``), since they share queues: an estimate of a second does
    not wait behind a verification that became due in the same pass. Within a stage, projects take turns.

    ``in_flight`` bounds the unanswered doorbells of a stage; one unanswered for ``again_s`` seconds counts
    as lost. A job that was never tried is left alone for ``grace_s`` seconds (absent: 0), for workers that take what
    waits without a doorbell. Marked first, sent after: a dispatcher that dies in between costs ``again_s``, never a
    job. The marks need not survive a crash of Postgres, so they are not flushed.
    """
    order = list(in_flight)
    parameters = {
        "stages": [stage.value for stage in order],
        "bounds": [in_flight[stage] for stage in order],
        "again": [float(again_s[stage]) for stage in order],
        "grace": [float(grace_s.get(stage, 0.0)) for stage in order],
    }
    rows = connection.execute(_DUE, parameters).all()
    turn = {stage.value: number for number, stage in enumerate(Stage)}
    return [Doorbell(row.id, Stage(row.stage)) for row in sorted(rows, key=lambda row: (turn[row.stage], row.place))]


def forget_dispatch(connection: Connection, job_ids: Sequence[uuid.UUID] | None) -> int:
    """The doorbells of these jobs (None: of all) were not sent or are lost: they are due again at once."""
    chosen = "" if job_ids is None else "AND id = ANY(:ids)"
    statement = text(
        f"UPDATE jobs SET dispatched_at = NULL WHERE state = 'QUEUED' AND dispatched_at IS NOT NULL {chosen}"  # noqa: S608
    )
    return connection.execute(statement, {} if job_ids is None else {"ids": list(job_ids)}).rowcount


def expire_leases(connection: Connection, limit: int, rng: random.Random) -> list[Job]:
    """Take back jobs whose worker fell silent: queued again with a delay, dead, or CANCELLED if so asked."""
    statement = (
        select(JOBS)
        .where(JOBS.c.state.in_([State.RUNNING.value, State.CANCELLING.value]), JOBS.c.lease_until < text("now()"))
        .order_by(JOBS.c.lease_until)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    changed: list[Job] = []
    for job in map(to_job, connection.execute(statement).mappings().all()):
        if job.state is State.CANCELLING:
            changed.append(change(connection, job, State.CANCELLED, actor=_DISPATCHER, reason="lease expired"))
            continue
        error = LeaseExpired(f"worker {job.lease_owner} fell silent", worker=job.lease_owner, stage=job.stage)
        changed.append(retry_or_end(connection, job, error, actor=_DISPATCHER, rng=rng))
    return changed


def expire_jobs(connection: Connection, limit: int) -> list[Job]:
    """End jobs that outlived their time to live; whoever works on one loses its lease by that."""
    statement = (
        select(JOBS)
        .where(
            JOBS.c.state.in_([State.QUEUED.value, State.RUNNING.value, State.CANCELLING.value]),
            JOBS.c.expire_time < text("now()"),
        )
        .order_by(JOBS.c.expire_time)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    changed: list[Job] = []
    for job in map(to_job, connection.execute(statement).mappings().all()):
        if job.state is State.CANCELLING:
            changed.append(change(connection, job, State.CANCELLED, actor=_DISPATCHER, reason="time is up"))
            continue
        error = DeadlineExceeded(
            f"the job did not end within its time to live (it was in stage {job.stage})", stage=job.stage
        )
        changed.append(end_failed(connection, job, error, actor=_DISPATCHER))
    return changed


def depths(connection: Connection) -> list[StageDepth]:
    """How each stage stands, in the order of ``Stage``."""
    rows = {row.stage: row for row in connection.execute(_DEPTHS, {"stages": [stage.value for stage in Stage]})}
    return [
        StageDepth(
            stage=stage,
            queued=rows[stage].queued,
            running=rows[stage].running,
            dispatched=rows[stage].dispatched,
            oldest_wait_s=float(rows[stage].wait),
            paused=rows[stage].paused,
        )
        for stage in Stage
    ]


def anybody_waits(connection: Connection, stages: Collection[Stage], for_s: float) -> bool:
    """Whether a job waits for one of ``stages`` since ``for_s`` seconds with its doorbell rung: workers are busy."""
    statement = text("""
        SELECT EXISTS (
            SELECT 1 FROM jobs j WHERE j.state = 'QUEUED' AND j.stage = ANY(:stages) AND j.dispatched_at IS NOT NULL
                AND j.update_time <= now() - make_interval(secs => :waited)
                AND (j.next_attempt_at IS NULL OR j.next_attempt_at <= now())
                AND NOT EXISTS (SELECT 1 FROM stage_controls c WHERE c.stage = j.stage AND c.paused)
        )
    """)
    parameters = {"stages": [stage.value for stage in stages], "waited": float(for_s)}
    return bool(connection.execute(statement, parameters).scalar_one())


def set_paused(connection: Connection, stage: Stage, paused: bool) -> None:
    """Pause or resume a stage: no new claim while paused; running work goes on. Survives restarts."""
    connection.execute(
        text(
            "INSERT INTO stage_controls (stage, paused) VALUES (:stage, :paused) "
            "ON CONFLICT (stage) DO UPDATE SET paused = excluded.paused"
        ),
        {"stage": stage.value, "paused": paused},
    )
    if not paused:
        # Doorbells answered during the pause were refused; their jobs are due again.
        connection.execute(
            text("UPDATE jobs SET dispatched_at = NULL WHERE state = 'QUEUED' AND stage = :stage"),
            {"stage": stage.value},
        )
