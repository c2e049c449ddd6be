"""Taking in jobs: idempotent by request id, and bounded, each queue as a whole and each project's part of it.

Why it exists: ``Create`` is acknowledged when this transaction commits, so what it inserts is never lost;
the same request twice must give the same job; and a bounded queue is the only back-pressure there is. A project that
could fill a queue alone would shut the others out, however fairly their turns are given once they are in.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Connection, select, text, tuple_

from byline.errors import InvalidRequest, QueueFull, QuotaExceeded, RequestIdReused
from byline.jobs.model import Job, NewJob, fingerprint, labelled_queries, pack_embedding
from byline.jobs.rows import COLUMNS, JOB_QUERIES, JOBS, selecting_jobs, to_job
from byline.jobs.states import Kind, Stage, Tier, first_stage, stages

#: Below ``bound - margin`` jobs are admitted without a lock: concurrent creators cannot overshoot by more.
_MARGIN = 256
_LOCK_CLASS = 0x62796C  # first key of the advisory locks, the second is the stage's number
_PROJECT_LOCK_CLASS = 0x62796D  # the second key is the project's hash

# One statement, and text: what a lookup of milliseconds pays for building and sending statements is most of its cost.
_INSERT = selecting_jobs(f"""
WITH made AS (
    INSERT INTO jobs (id, project_id, request_id, fingerprint, kind, model_id, prompt, image_sha256, embedding, tier,
        verification, top_k, candidates, payload, state, stage, max_attempts, expire_time, traceparent, principal)
    SELECT CAST(:id AS uuid), :project_id, :request_id, :fingerprint, :kind, :model_id, :prompt, :image_sha256,
        CAST(:embedding AS bytea), :tier, :verification, :top_k, :candidates, CAST(:payload AS jsonb), 'QUEUED', :stage,
        :max_attempts, now() + make_interval(secs => :ttl_s), CAST(:traceparent AS text), :principal
    WHERE CAST(:room AS bigint) IS NULL OR CAST(:room AS bigint) > (
        SELECT count(*) FROM (SELECT 1 FROM jobs WHERE stage = :stage AND state = 'QUEUED' LIMIT :room) AS waiting
    ) AND (CAST(:quota AS bigint) IS NULL OR CAST(:quota AS bigint) > (
        SELECT count(*) FROM (
            SELECT 1 FROM jobs WHERE stage = :stage AND state = 'QUEUED' AND project_id = :project_id LIMIT :quota
        ) AS own
    ))
    ON CONFLICT DO NOTHING RETURNING *
), noted AS (
    INSERT INTO job_events (job_id, to_state, stage, actor, fence, reason)
    SELECT id, state, stage, 'client', 0, 'created' FROM made
), lazily AS (
    SELECT CASE WHEN :lazy THEN set_config('synchronous_commit', 'off', true) END FROM made
)
SELECT {COLUMNS} FROM made LEFT JOIN lazily ON true
""")  # noqa: S608

Key = tuple[str, str]


@dataclass(frozen=True)
class Limits:
    """The most jobs that may wait for each stage (absent: no bound), and the most of that which one project may."""

    bounds: Mapping[Stage, int] = field(default_factory=dict)
    project_share: float = 1.0

    def quota(self, stage: Stage) -> int | None:
        """The most jobs of one project that may wait for ``stage``, one at least; None where nothing is bounded."""
        bound = self.bounds.get(stage)
        return None if bound is None else max(1, math.floor(bound * self.project_share))


def admit(
    connection: Connection,
    news: Sequence[NewJob],
    limits: Limits,
    new_id: Callable[[], uuid.UUID],
    *,
    lazy: bool = False,
) -> list[tuple[Job, bool]]:
    """Insert what is new; return each request's job, and whether this call created it, in order.

    All or nothing. Raises ``RequestIdReused`` (same id, other contents), ``QueueFull`` and ``QuotaExceeded``;
    a request that exists already is answered even when the queue is full. Insert first, then look: no read-then-write
    race. A ``lazy`` commit of new jobs does not wait for the disk.
    """
    if not news:
        return []
    prints = {_key(new): fingerprint(_checked(new)) for new in reversed(news)}
    # Sorted, so that two batches with common ids wait for each other instead of deadlocking.
    unique = {_key(new): new for new in reversed(news)}
    created: dict[Key, Job] = {}
    for key in sorted(unique):
        values = _columns(unique[key], prints[key], new_id()) | {"lazy": lazy, "room": None, "quota": None}
        row = connection.execute(_INSERT, values).mappings().first()
        if row is not None:
            created[key] = to_job(row)
    if created:
        _check_bounds(connection, list(created.values()), limits)
        if labels := [row for job in created.values() for row in _labels(job)]:
            connection.execute(JOB_QUERIES.insert(), labels)
    missing = [key for key in unique if key not in created]
    existing = _existing(connection, missing)
    answers: list[tuple[Job, bool]] = []
    for new in news:
        key = _key(new)
        job = created.get(key) or existing[key]
        if job.fingerprint != fingerprint(new):
            raise RequestIdReused(
                "request_id", "was used before for another request; choose a new one", existing_job=job.id
            )
        answers.append((job, key in created and all(job is not answered for answered, _ in answers)))
    return answers


def admit_alone(
    connection: Connection, new: NewJob, limits: Limits, new_id: Callable[[], uuid.UUID], *, lazy: bool
) -> Job | None:
    """One new job of one stage whose queue is far from full: a single statement, also as a transaction of its own.

    None, and nothing done, for every other case, which is ``admit``'s: a job that exists, one that will pass through
    several stages, a queue near its bound, a project near its share of it.
    """
    if new.kind is not Kind.ATTRIBUTION or stages(new.kind, new.tier) != (first_stage(new.kind),):
        return None
    room, quota = limits.bounds.get(first_stage(new.kind)), limits.quota(first_stage(new.kind))
    if room is not None and quota is not None:
        room, quota = room - _MARGIN, quota - _MARGIN
        if min(room, quota) <= 0:
            return None
    values = _columns(new, fingerprint(_checked(new)), new_id()) | {"lazy": lazy, "room": room, "quota": quota}
    row = connection.execute(_INSERT, values).mappings().first()
    return None if row is None else to_job(row)


def _key(job: NewJob | Job) -> Key:
    return job.project_id, job.request_id


def _checked(new: NewJob) -> NewJob:
    for name in ("project_id", "request_id", "prompt"):
        if "\x00" in getattr(new, name):
            raise InvalidRequest(name, "must not contain the character NUL")
    return new


def _columns(new: NewJob, print_: str, job_id: uuid.UUID) -> dict[str, object]:
    return {
        "id": job_id,
        "project_id": new.project_id,
        "request_id": new.request_id,
        "fingerprint": print_,
        "kind": new.kind,
        "model_id": new.model_id,
        "prompt": new.prompt,
        "image_sha256": new.image_sha256,
        "embedding": None if new.embedding is None else pack_embedding(new.embedding),
        "tier": new.tier,
        "verification": new.verification,
        "top_k": new.top_k,
        "candidates": new.candidates,
        "payload": json.dumps(dict(new.payload)),
        "stage": first_stage(new.kind),
        "max_attempts": new.max_attempts,
        "ttl_s": float(new.ttl_s),
        "traceparent": new.traceparent,
        "principal": new.principal,
    }


def _labels(job: Job) -> list[dict[str, object]]:
    """The queries a ranking job labels, for ``job_queries``."""
    if job.kind is not Kind.RANKING:
        return []
    teacher = str(job.payload.get("teacher") or "")
    return [{"job_id": job.id, "query_id": query, "teacher": teacher} for query in labelled_queries(job.payload)]


def _existing(connection: Connection, keys: Sequence[Key]) -> dict[Key, Job]:
    if not keys:
        return {}
    statement = select(JOBS).where(tuple_(JOBS.c.project_id, JOBS.c.request_id).in_(keys))
    return {_key(job): job for job in map(to_job, connection.execute(statement).mappings())}


def _check_bounds(connection: Connection, created: Sequence[Job], limits: Limits) -> None:
    """Roll back (by raising) if a stage these jobs will pass through holds more than its bound, or more of a project
    than its share."""
    touched = {stage for job in created for stage in stages(job.kind, job.tier)}
    for number, stage in enumerate(Stage):
        bound, quota = limits.bounds.get(stage), limits.quota(stage)
        if bound is None or quota is None or stage not in touched:
            continue
        waiting = _waiting(connection, stage, bound)
        if waiting > bound - _MARGIN:
            # Near the bound: one creator at a time, each seeing what the one before it committed.
            connection.execute(text("SELECT pg_advisory_xact_lock(:c, :s)"), {"c": _LOCK_CLASS, "s": number})
            waiting = _waiting(connection, stage, bound)
        if waiting > bound:
            raise QueueFull(f"the {stage} queue holds its bound of {bound} jobs; try again later", stage=stage)
        if limits.project_share < 1:
            for project_id in sorted({job.project_id for job in created}):
                _check_quota(connection, project_id, stage, quota)


def _check_quota(connection: Connection, project_id: str, stage: Stage, quota: int) -> None:
    waiting = _waiting(connection, stage, quota, project_id)
    if waiting > quota - _MARGIN:
        lock = text("SELECT pg_advisory_xact_lock(:c, hashtext(:p))")
        connection.execute(lock, {"c": _PROJECT_LOCK_CLASS, "p": project_id})
        waiting = _waiting(connection, stage, quota, project_id)
    if waiting > quota:
        raise QuotaExceeded(
            f"{quota} jobs of this project wait for {stage} already, which is its share; try again when some are done",
            project=project_id, stage=stage, quota=quota,
        )  # fmt: skip


def _waiting(connection: Connection, stage: Stage, bound: int, project_id: str | None = None) -> int:
    """Jobs (of one project) waiting for ``stage``, now or later, counted no further than needed, own inserts too."""
    if stage is Stage.VERIFY:
        condition = "tier = :tier AND kind = 'attribution' AND state IN ('QUEUED', 'RUNNING', 'CANCELLING')"
    elif stage is Stage.ESTIMATE:
        condition = "tier = :tier AND kind = 'attribution' AND state = 'QUEUED'"
    else:
        condition = "stage = :stage AND state = 'QUEUED'"
    if project_id is not None:
        condition += " AND project_id = :project"
    tier = Tier.VERIFIED if stage is Stage.VERIFY else Tier.ESTIMATED
    statement = text(f"SELECT count(*) FROM (SELECT 1 FROM jobs WHERE {condition} LIMIT :most) AS waiting")  # noqa: S608
    parameters = {"stage": stage, "tier": tier, "most": bound + 1, "project": project_id}
    return int(connection.execute(statement, parameters).scalar_one())
