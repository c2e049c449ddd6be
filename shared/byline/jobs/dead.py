"""Dead jobs: those that used up their attempts, for an operator to try again or put aside.

Why it exists: a dead letter is a state in the table, not a second queue. A terminal state is never left, so
trying again makes a *new* job with the same contents, named after the dead one; both show the link.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, func, select, tuple_, update

from byline.errors import AttemptsExhausted, JobNotFound, JobNotRetryable
from byline.jobs.model import Job, NewJob
from byline.jobs.rows import JOBS, find, to_job
from byline.jobs.states import State


def dead(
    connection: Connection, project_id: str | None, limit: int, after: tuple[datetime, uuid.UUID] | None
) -> Sequence[Job]:
    """Dead jobs nobody has dealt with, latest end first; ``after`` is the last (end_time, id) of a page."""
    statement = select(JOBS).where(JOBS.c.state == State.FAILED.value, _is_dead(), _handled().is_(None))
    if project_id is not None:
        statement = statement.where(JOBS.c.project_id == project_id)
    if after is not None:
        statement = statement.where(tuple_(JOBS.c.end_time, JOBS.c.id) < after)
    statement = statement.order_by(JOBS.c.end_time.desc(), JOBS.c.id.desc()).limit(limit)
    return [to_job(row) for row in connection.execute(statement).mappings()]


def successor(connection: Connection, job_id: uuid.UUID) -> NewJob:
    """The request that repeats a dead job, with the same time to live. Marks the dead job as retried.

    Raises ``JobNotFound``, ``JobNotRetryable``.
    """
    job = _lock_dead(connection, job_id)
    _mark(connection, job, "retried")
    return NewJob(
        project_id=job.project_id,
        request_id=f"retry-of:{job.id}",
        model_id=job.model_id,
        prompt=job.prompt,
        kind=job.kind,
        image_sha256=job.image_sha256,
        embedding=job.embedding,
        tier=job.tier,
        verification=job.verification,
        top_k=job.top_k,
        candidates=job.candidates,
        ttl_s=(job.expire_time - job.create_time).total_seconds(),
        payload={**job.payload, "retry_of": str(job.id)},
        principal=job.principal,
        max_attempts=job.max_attempts,
    )


def discard(connection: Connection, job_id: uuid.UUID) -> None:
    """Put a dead job aside: it stays FAILED and is no longer listed. Raises as ``successor``."""
    _mark(connection, _lock_dead(connection, job_id), "discarded")


def _lock_dead(connection: Connection, job_id: uuid.UUID) -> Job:
    job = find(connection, job_id, lock=True)
    if job is None:
        raise JobNotFound(f"there is no job {job_id}", job_id=job_id)
    if job.state is not State.FAILED or (job.error or {}).get("reason") != AttemptsExhausted.reason:
        raise JobNotRetryable(f"job {job_id} is not a dead job", job_id=job_id, state=job.state)
    return job


def _mark(connection: Connection, job: Job, handled: str) -> None:
    error = dict(job.error or {})
    error["metadata"] = {**error.get("metadata", {}), "handled": handled}
    connection.execute(update(JOBS).where(JOBS.c.id == job.id).values(error=error))


def _is_dead() -> ColumnElement[bool]:
    return func.jsonb_extract_path_text(JOBS.c.error, "reason") == AttemptsExhausted.reason


def _handled() -> ColumnElement[str]:
    return func.jsonb_extract_path_text(JOBS.c.error, "metadata", "handled")
