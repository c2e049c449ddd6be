"""The job store: every operation on jobs, each in one transaction of its own.

Why it exists: services hold this one object; the statements live beside it, by concern (``admission``,
``leases``, ``outbox``, ``dead``). Only the database's clock decides leases and deadlines. Every method may
raise ``DatabaseUnavailable``, and every method is safe to repeat after that.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, func, select, text, tuple_

from byline.db.session import single_statements, transaction
from byline.errors import BylineError, JobNotCancellable, JobNotFound
from byline.jobs import admission, dead, leases, outbox, waiting
from byline.jobs.model import Claim, Job, JobEvent, NewJob, StageResult
from byline.jobs.outbox import Doorbell, StageDepth
from byline.jobs.rows import EVENTS, JOBS, Pins, change, find, find_with_results, results_of, to_event, to_job
from byline.jobs.states import Stage, State

#: A commit waits for the disk only if it wrote something: this writes a few bytes to the log and to no table.
_FLUSH = text("SELECT pg_logical_emit_message(true, 'byline', '')")


class JobStore:
    """Jobs in Postgres. Thread-safe; ``bounds`` is the most jobs that may wait for each stage (absent: no bound), of
    which one project may have ``project_share``.

    ``rng`` gives the jitter of retries and ``new_id`` the ids of new jobs.
    """

    def __init__(
        self,
        engine: Engine,
        bounds: Mapping[Stage, int],
        *,
        project_share: float = 1.0,
        rng: random.Random | None = None,
        new_id: Callable[[], uuid.UUID] = uuid.uuid4,
    ) -> None:
        self._engine = engine
        self._limits = admission.Limits(dict(bounds), project_share)
        self._rng = rng or random.Random()
        self._new_id = new_id

    # --- clients ---------------------------------------------------------------------------------------

    def create(self, new: NewJob) -> tuple[Job, bool]:
        """The job of this request, and whether this call created it.

        Raises ``RequestIdReused``, ``QueueFull``, ``QuotaExceeded``, ``InvalidRequest``.
        """
        return self.create_many([new])[0]

    def create_many(self, news: Sequence[NewJob]) -> list[tuple[Job, bool]]:
        """As ``create`` for each, in order, in one transaction: all of them or none."""
        with transaction(self._engine) as connection:
            return self.create_within(connection, news)

    def create_within(
        self, connection: Connection, news: Sequence[NewJob], *, flush: bool = True
    ) -> list[tuple[Job, bool]]:
        """As ``create_many`` inside the caller's transaction, for rows that must appear together.

        Without ``flush`` the commit does not wait for the disk: such a job is no promise yet (see ``flush``).
        """
        made = admission.admit(connection, news, self._limits, self._new_id, lazy=not flush)
        if flush and not all(created for _, created in made):
            connection.execute(_FLUSH)  # the job this request made before may not be on disk yet
        return made

    def create_alone(self, connection: Connection, new: NewJob, *, flush: bool = True) -> Job | None:
        """One job by one statement, if nothing speaks against it; None if only ``create_within`` can tell.

        For a connection of single statements. ``flush`` as there.
        """
        return admission.admit_alone(connection, new, self._limits, self._new_id, lazy=not flush)

    def flush(self) -> None:
        """When this returns, everything committed before it survives a crash of Postgres."""
        with transaction(self._engine) as connection:
            connection.execute(_FLUSH)

    @staticmethod
    def asked_before(connection: Connection, project_id: str, request_id: str) -> bool:
        """Whether a job of this request exists, whatever its contents: ``create`` then answers with it."""
        statement = select(JOBS.c.id).where(JOBS.c.project_id == project_id, JOBS.c.request_id == request_id)
        return connection.execute(statement).first() is not None

    def get(self, project_id: str, job_id: uuid.UUID) -> Job:
        """The project's job. Raises ``JobNotFound``, also for another project's job."""
        with transaction(self._engine) as connection:
            job = find(connection, job_id)
        if job is None or job.project_id != project_id:
            raise _not_found(job_id)
        return job

    @staticmethod
    def find_with_results(connection: Connection, job_id: uuid.UUID) -> tuple[Job, Sequence[StageResult]] | None:
        """The job of any project and its stages' results, by one statement on the caller's connection."""
        return find_with_results(connection, job_id)

    @staticmethod
    def find_within(connection: Connection, job_id: uuid.UUID) -> Job | None:
        """As ``find``, inside the caller's transaction."""
        return find(connection, job_id)

    def find(self, job_id: uuid.UUID) -> Job | None:
        """The job of any project; for services only, never for a client's request."""
        with transaction(self._engine) as connection:
            return find(connection, job_id)

    def list(
        self,
        project_id: str,
        states: Collection[State] = (),
        page_size: int = 50,
        after: tuple[datetime, uuid.UUID] | None = None,
    ) -> Sequence[Job]:
        """The project's jobs, newest first, those in ``states`` only if any are named.

        ``after`` is (create_time, id) of the last job of the page before; pages neither skip nor repeat.
        """
        statement = select(JOBS).where(JOBS.c.project_id == project_id)
        if states:
            statement = statement.where(JOBS.c.state.in_([state.value for state in states]))
        if after is not None:
            statement = statement.where(tuple_(JOBS.c.create_time, JOBS.c.id) < after)
        statement = statement.order_by(JOBS.c.create_time.desc(), JOBS.c.id.desc()).limit(page_size)
        with transaction(self._engine) as connection:
            return [to_job(row) for row in connection.execute(statement).mappings()]

    def cancel(self, project_id: str, job_id: uuid.UUID) -> Job:
        """Cancel at once if no worker holds the job, else ask its worker to stop (CANCELLING).

        Repeating it is harmless. Raises ``JobNotFound``, and ``JobNotCancellable`` if the job ended otherwise.
        """
        with transaction(self._engine) as connection:
            job = find(connection, job_id, lock=True)
            if job is None or job.project_id != project_id:
                raise _not_found(job_id)
            if job.state in (State.CANCELLING, State.CANCELLED):
                return job
            if job.is_terminal:
                raise JobNotCancellable(f"the job is {job.state} already", job_id=job_id, state=job.state)
            to = State.CANCELLED if job.state is State.QUEUED else State.CANCELLING
            return change(
                connection, job, to, actor="client", reason="cancel requested", cancel_requested_at=func.now()
            )

    def results(self, job_id: uuid.UUID) -> dict[Stage, StageResult]:
        """What each finished stage of the job found."""
        with transaction(self._engine) as connection:
            return self.results_within(connection, job_id)

    @staticmethod
    def results_within(connection: Connection, job_id: uuid.UUID) -> dict[Stage, StageResult]:
        """As ``results``, inside the caller's transaction."""
        return {result.stage: result for result in results_of(connection, job_id)}

    def events(self, job_id: uuid.UUID) -> Sequence[JobEvent]:
        """Every change of the job's state, oldest first."""
        statement = select(EVENTS).where(EVENTS.c.job_id == job_id).order_by(EVENTS.c.id)
        with transaction(self._engine) as connection:
            return [to_event(row) for row in connection.execute(statement).mappings()]

    # --- workers ---------------------------------------------------------------------------------------

    def claim(
        self, job_id: uuid.UUID, stage: Stage, worker_id: str, lease_s: float, release_id: Pins = None
    ) -> Claim | None:
        """Take the lease on this stage, or None if there is nothing to do (a duplicate doorbell, mostly).

        Pins ``release_id`` to the job if none is pinned yet; read the pinned one from ``claim.job``. A mapping pins by
        the job's model, and leaves jobs of models that are not in it to other workers.
        """
        with single_statements(self._engine) as connection:
            return leases.claim(connection, job_id, stage, worker_id=worker_id, lease_s=lease_s, release_id=release_id)

    def claim_waiting(
        self, stage: Stage, worker_id: str, lease_s: float, release_id: Pins, most: int
    ) -> Sequence[Claim]:
        """Take the leases of up to ``most`` jobs that wait for ``stage``; see ``waiting.claim_waiting``."""
        with single_statements(self._engine) as connection:
            return waiting.claim_waiting(
                connection, stage, worker_id=worker_id, lease_s=lease_s, release_id=release_id, most=most
            )

    def complete_last(self, done: Sequence[waiting.Done]) -> set[uuid.UUID]:
        """Complete several jobs at once; returns those written. See ``waiting.complete_last``."""
        with single_statements(self._engine) as connection:
            return waiting.complete_last(connection, done)

    def heartbeat(self, claim: Claim, done: int, total: int, lease_s: float) -> bool:
        """Extend the lease by ``lease_s`` from now; True if cancellation was asked for. Raises ``LeaseLost``."""
        with transaction(self._engine) as connection:
            return leases.heartbeat(connection, claim, done, total, lease_s)

    def cancel_requested(self, claim: Claim) -> bool:
        """Whether this claim's job is to be stopped. Writes nothing: for looking more often than the lease needs."""
        statement = select(JOBS.c.cancel_requested_at).where(JOBS.c.id == claim.job.id, JOBS.c.fence == claim.fence)
        with single_statements(self._engine) as connection:
            return connection.execute(statement).scalar() is not None

    def complete(
        self, claim: Claim, result: Mapping[str, Any], also: Callable[[Connection], None] | None = None
    ) -> Job:
        """Write the stage's result and queue the next stage, or end the job, in one transaction.

        ``also`` writes further rows in that transaction. Returns a CANCELLED job, with nothing written, if
        cancellation was asked for meanwhile. Raises ``LeaseLost``.
        """
        with transaction(self._engine) as connection:
            return leases.complete(connection, claim, result, also)

    def fail(self, claim: Claim, error: BylineError, retry: bool) -> Job:
        """End this attempt: queued again with a delay if ``retry`` and attempts are left, else ended.

        Raises ``LeaseLost``.
        """
        with transaction(self._engine) as connection:
            return leases.fail(connection, claim, error, retry=retry, rng=self._rng)

    def acknowledge_cancel(self, claim: Claim) -> Job:
        """The worker stopped as asked: CANCELLED. Raises ``LeaseLost``, ``IllegalTransition``."""
        with transaction(self._engine) as connection:
            return leases.acknowledge_cancel(connection, claim)

    def release(self, claim: Claim, reason: str = "worker stopping") -> Job:
        """Give the lease back unfinished (graceful stop): queued at once, the attempt not counted.

        Raises ``LeaseLost``.
        """
        with transaction(self._engine) as connection:
            return leases.give_back(connection, claim, reason)

    # --- dispatcher and operators ----------------------------------------------------------------------

    def take_due(
        self,
        in_flight: Mapping[Stage, int],
        again_s: Mapping[Stage, float],
        grace_s: Mapping[Stage, float] | None = None,
    ) -> Sequence[Doorbell]:
        """Doorbells to ring now, marked as rung; see ``outbox.take_due``."""
        with transaction(self._engine) as connection:
            return outbox.take_due(connection, in_flight, again_s, grace_s or {})

    def forget_dispatch(self, job_ids: Sequence[uuid.UUID] | None) -> int:
        """These doorbells (None: all) were not sent or are lost; returns how many are due again."""
        with transaction(self._engine) as connection:
            return outbox.forget_dispatch(connection, job_ids)

    def expire_leases(self, limit: int = 100) -> Sequence[Job]:
        """Take jobs back from workers that fell silent; returns them as they are now."""
        with transaction(self._engine) as connection:
            return outbox.expire_leases(connection, limit, self._rng)

    def expire_jobs(self, limit: int = 100) -> Sequence[Job]:
        """End jobs that outlived their time to live; returns them as they are now."""
        with transaction(self._engine) as connection:
            return outbox.expire_jobs(connection, limit)

    def depths(self) -> Sequence[StageDepth]:
        """Queued, running and waiting of every stage."""
        with transaction(self._engine) as connection:
            return outbox.depths(connection)

    def anybody_waits(self, stages: Collection[Stage], for_s: float) -> bool:
        """Whether a job has waited so long for one of these stages, due, not paused, and its doorbell rung."""
        with transaction(self._engine) as connection:
            return outbox.anybody_waits(connection, stages, for_s)

    def set_paused(self, stage: Stage, paused: bool) -> None:
        """Pause or resume a stage for every worker."""
        with transaction(self._engine) as connection:
            outbox.set_paused(connection, stage, paused)

    def dead(
        self, project_id: str | None = None, limit: int = 50, after: tuple[datetime, uuid.UUID] | None = None
    ) -> Sequence[Job]:
        """Jobs that used up their attempts and were not dealt with, latest first."""
        with transaction(self._engine) as connection:
            return dead.dead(connection, project_id, limit, after)

    def retry_dead(self, job_id: uuid.UUID) -> Job:
        """A new job that repeats a dead one (the same one if repeated). Raises ``JobNotRetryable``, ``QueueFull``."""
        with transaction(self._engine) as connection:
            return self.create_within(connection, [dead.successor(connection, job_id)])[0][0]

    def discard_dead(self, job_id: uuid.UUID) -> None:
        """Put a dead job aside. Raises ``JobNotFound``, ``JobNotRetryable``."""
        with transaction(self._engine) as connection:
            dead.discard(connection, job_id)


def _not_found(job_id: uuid.UUID) -> JobNotFound:
    return JobNotFound(f"there is no job {job_id}", job_id=job_id)
