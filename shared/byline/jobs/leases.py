"""A worker's side of a job: claim, heartbeat, complete, fail, cancel, give back.

Why it exists: the four promises about effects rest on these statements alone. A claim raises the fence and
sets a lease by the database's clock; every later write of the worker must find its fence on a row that is
still RUNNING (or CANCELLING), under the row's lock, or it changes nothing and raises ``LeaseLost``.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Connection, select, text

from byline.errors import BylineError, LeaseLost
from byline.failpoints import failpoint
from byline.jobs.model import Claim, Job
from byline.jobs.retry import retry_delay_s
from byline.jobs.rows import (
    COLUMNS,
    EVENTS,
    WAITED,
    Pins,
    add_result,
    change,
    claiming_jobs,
    end_failed,
    exhausted,
    find,
    pinning,
    requeue,
    to_claim,
)
from byline.jobs.states import Stage, State, next_stage

# (The claim is not flushed to disk: see ``waiting``.)
# One statement, so that of many workers with the same doorbell exactly one gets the row. The attempt is
# counted here, before any work: a job that kills its worker is counted too.
_CLAIM = claiming_jobs(f"""
WITH prior AS (
    SELECT id, state, COALESCE(next_attempt_at, update_time) AS since FROM jobs
    WHERE id = :id AND stage = :stage AND cancel_requested_at IS NULL AND attempt < max_attempts
      AND expire_time > now()
      AND (CAST(:pins AS jsonb) IS NULL OR jsonb_exists(CAST(:pins AS jsonb), model_id))
      AND ((state = 'QUEUED' AND (next_attempt_at IS NULL OR next_attempt_at <= now()))
           OR (state = 'RUNNING' AND lease_until < now()))
      AND NOT EXISTS (SELECT 1 FROM stage_controls WHERE stage_controls.stage = :stage AND paused)
    FOR UPDATE OF jobs
), claimed AS (
    UPDATE jobs SET state = 'RUNNING', attempt = attempt + 1, fence = fence + 1, lease_owner = :worker,
        lease_until = now() + make_interval(secs => :lease),
        release_id = COALESCE(release_id, :release, CAST(:pins AS jsonb) ->> model_id),
        start_time = COALESCE(start_time, now()), next_attempt_at = NULL, progress_done = 0, progress_total = 0
    FROM prior WHERE jobs.id = prior.id
    RETURNING jobs.*, prior.state AS prior_state, prior.since
), noted AS (
    INSERT INTO job_events (job_id, from_state, to_state, stage, actor, fence, reason)
    SELECT id, prior_state, state, stage, :worker, fence,
           CASE prior_state WHEN 'RUNNING' THEN 'lease taken over' ELSE 'claimed' END FROM claimed
), lazily AS (
    SELECT set_config('synchronous_commit', 'off', true) WHERE EXISTS (SELECT 1 FROM claimed)
)
SELECT {COLUMNS}, {WAITED} FROM claimed LEFT JOIN lazily ON true
""")  # noqa: S608

#: Why a stage ended, in its event; ``waiting`` writes the same.
_COMPLETED = "completed"

_HEARTBEAT = text("""
UPDATE jobs SET lease_until = now() + make_interval(secs => :lease),
    progress_done = :done, progress_total = :total
WHERE id = :id AND fence = :fence AND stage = :stage AND lease_owner = :worker
    AND state IN ('RUNNING', 'CANCELLING')
RETURNING cancel_requested_at IS NOT NULL
""")


def claim(
    connection: Connection,
    job_id: uuid.UUID,
    stage: Stage,
    *,
    worker_id: str,
    lease_s: float,
    release_id: Pins,
) -> Claim | None:
    """Take the lease, or None if there is nothing to do (taken, ended, paused, not due, another stage or model)."""
    parameters = {"id": job_id, "stage": stage, "worker": worker_id, "lease": lease_s, **pinning(release_id)}
    row = connection.execute(_CLAIM, parameters).mappings().first()
    if row is None:
        return None
    return to_claim(row, worker_id)


def heartbeat(connection: Connection, held: Claim, done: int, total: int, lease_s: float) -> bool:
    """Extend the lease and report progress; True if cancellation was asked for. Raises ``LeaseLost``."""
    parameters = {
        "id": held.job.id,
        "fence": held.fence,
        "stage": held.stage,
        "worker": held.worker_id,
        "done": done,
        "total": total,
        "lease": lease_s,
    }
    row = connection.execute(_HEARTBEAT, parameters).first()
    if row is None:
        raise _lost(held)
    return bool(row[0])


def complete(
    connection: Connection,
    held: Claim,
    result: Mapping[str, Any],
    also: Callable[[Connection], None] | None,
) -> Job:
    """Write the stage's result and move on, in this transaction; ``also`` writes what belongs to it.

    A repeat of a completion that did commit (its answer was lost) changes nothing and returns the job. A
    job that is being cancelled becomes CANCELLED and keeps nothing of this stage. Raises ``LeaseLost``.
    """
    job = _held(connection, held)
    if job is None:
        current = find(connection, held.job.id)
        if current is None or not _completed_before(connection, held):
            raise _lost(held)
        return current
    if job.state is State.CANCELLING:
        return change(connection, job, State.CANCELLED, actor=held.worker_id, reason="cancelled")
    add_result(connection, job, result)
    failpoint("jobs.in_complete")
    if also is not None:
        also(connection)
    following = next_stage(job.stage, job.tier)
    if following is None:
        return change(connection, job, State.SUCCEEDED, actor=held.worker_id, reason=_COMPLETED, error=None)
    return requeue(
        connection,
        job,
        actor=held.worker_id,
        reason=f"{job.stage} {_COMPLETED}",
        delay_s=0,
        stage=following,
        attempt=0,
        error=None,
        progress_done=0,
        progress_total=0,
    )


def fail(connection: Connection, held: Claim, error: BylineError, *, retry: bool, rng: random.Random) -> Job:
    """End this attempt. ``retry`` puts the job back with a delay while attempts are left. Raises ``LeaseLost``."""
    job = _require(connection, held)
    if job.state is State.CANCELLING:
        return change(connection, job, State.CANCELLED, actor=held.worker_id, reason="cancelled")
    if not retry:
        return end_failed(connection, job, error, actor=held.worker_id)
    return retry_or_end(connection, job, error, actor=held.worker_id, rng=rng)


def retry_or_end(connection: Connection, job: Job, error: BylineError, *, actor: str, rng: random.Random) -> Job:
    """Queue a locked RUNNING job again after a delay, or end it as dead if this was its last attempt."""
    if job.attempt >= job.max_attempts:
        return end_failed(connection, job, exhausted(job, error.reason, error.message), actor=actor)
    # retry_after_s of 0 says that the next attempt meets other circumstances already.
    delay_s = 0.0 if error.retry_after_s == 0 else retry_delay_s(job.attempt, rng)
    return requeue(connection, job, actor=actor, reason=error.reason, delay_s=delay_s, error=error.to_json())


def acknowledge_cancel(connection: Connection, held: Claim) -> Job:
    """The worker stopped because cancellation was asked for. Raises ``LeaseLost``, ``IllegalTransition``."""
    job = _require(connection, held)
    return change(connection, job, State.CANCELLED, actor=held.worker_id, reason="cancelled")


def give_back(connection: Connection, held: Claim, reason: str) -> Job:
    """The worker stops for no fault of the job: queue it again at once, the attempt not counted. ``LeaseLost``."""
    job = _require(connection, held)
    if job.state is State.CANCELLING:
        return change(connection, job, State.CANCELLED, actor=held.worker_id, reason="cancelled")
    return requeue(connection, job, actor=held.worker_id, reason=reason, delay_s=0, attempt=job.attempt - 1)


def _held(connection: Connection, held: Claim) -> Job | None:
    """The claim's job, row-locked, if the claim still holds it."""
    job = find(connection, held.job.id, lock=True)
    if job is None or job.fence != held.fence or job.stage is not held.stage:
        return None
    if job.lease_owner != held.worker_id:
        # Claims are not flushed to disk at once: after a crash of Postgres another worker may hold the same fence.
        return None
    return job if job.state in (State.RUNNING, State.CANCELLING) else None


def _completed_before(connection: Connection, held: Claim) -> bool:
    """Whether this very claim was completed. That a result has its fence does not say so: the dispatcher ends a
    verification that is BEST_EFFORT with a result of its own."""
    reasons = (_COMPLETED, f"{held.stage} {_COMPLETED}")
    done = select(EVENTS.c.id).where(
        EVENTS.c.job_id == held.job.id, EVENTS.c.stage == held.stage, EVENTS.c.fence == held.fence,
        EVENTS.c.actor == held.worker_id, EVENTS.c.reason.in_(reasons),
    )  # fmt: skip
    return connection.execute(done.limit(1)).first() is not None


def _require(connection: Connection, held: Claim) -> Job:
    job = _held(connection, held)
    if job is None:
        raise _lost(held)
    return job


def _lost(held: Claim) -> LeaseLost:
    return LeaseLost(
        "the lease on this job was lost; stop, write nothing",
        job_id=held.job.id,
        stage=held.stage,
        fence=held.fence,
    )
