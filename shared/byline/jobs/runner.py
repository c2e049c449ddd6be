"""The loop every worker runs a stage in: claim, beat, work, complete or fail.

Why it exists: lookup, verification and ranking differ only in their work; everything that makes them safe
(the lease kept alive, cancellation and a lost lease noticed, errors classified, a restarted database waited
for) is here. The runner never decides by its own clock whether it holds the lease: the database says so.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from sqlalchemy import Connection

from byline import telemetry, tracing
from byline.errors import BylineError, DatabaseUnavailable, GaveWay, JobCancelled, LeaseLost, WorkerStopping
from byline.failpoints import failpoint
from byline.jobs.busy import BusyShare
from byline.jobs.model import Claim, Job
from byline.jobs.retry import is_retryable
from byline.jobs.rows import Pins
from byline.jobs.states import Stage, State
from byline.jobs.store import JobStore

log = telemetry.get_logger(__name__)

T = TypeVar("T")

#: Progress reaches the database at most this often; the lease is extended at the same time.
PROGRESS_EVERY_S = 0.5
#: How long the end of a stage is tried to be written while the database is away.
GIVE_UP_S = 120.0
RETRY_WRITE_S = 0.2


class RunOutcome(StrEnum):
    """How one delivery of a doorbell ended."""

    #: Nothing to do: taken by another worker, done, cancelled, paused or not due.
    DUPLICATE = "duplicate"
    #: The result is written; the job goes on to its next stage or has SUCCEEDED.
    COMPLETED = "succeeded"
    RETRIED = "retried"
    FAILED = "failed"
    CANCELLED = "cancelled"
    #: Another worker holds the job, or it ended without us; nothing was written.
    LEASE_LOST = "lease_lost"
    #: Given back because this worker is stopping, or does something more urgent first.
    RELEASED = "released"


@dataclass(frozen=True)
class Outcome:
    """What a stage found: its result JSON, and rows to write in the transaction that completes it.

    ``after`` is called once all of it is written, to clear away what would have let another attempt resume. It
    must not raise, and may never be called: the process may end before. ``named`` are the items that the result names:
    where several jobs are completed at once, one that names a withdrawn item is left to ``also``, which must refuse it.
    """

    result: Mapping[str, Any]
    also: Callable[[Connection], None] | None = None
    after: Callable[[], None] | None = None
    named: Sequence[int] = ()


class Beat:
    """The running stage's line to the job: report progress, and check whether to go on."""

    def __init__(self, stop: threading.Event, clock: Callable[[], float]) -> None:
        self._stop = stop
        self._clock = clock
        self._last_wake = clock()
        self.wake = threading.Event()
        self.counts = (0, 0)
        self.cancelled = False
        self.lost: LeaseLost | None = None

    def progress(self, done: int, total: int) -> None:
        """``done`` of ``total`` units are finished. Cheap: call it as often as you like. Does not raise."""
        self.counts = (done, total)
        now = self._clock()
        if now - self._last_wake >= PROGRESS_EVERY_S:
            self._last_wake = now
            self.wake.set()

    def check(self) -> None:
        """Raise ``LeaseLost``, ``JobCancelled`` or ``WorkerStopping`` if the stage must stop; call between steps."""
        if self.lost is not None:
            raise self.lost
        if self.cancelled:
            raise JobCancelled("the job was cancelled")
        if self._stop.is_set():
            raise WorkerStopping("this worker is stopping")


Work = Callable[[Claim, Beat], Outcome | Mapping[str, Any]]


#: Progress is written this often while it moves, so that a watcher of a slow stage sees it move; without progress only
#: the heartbeat writes. As often a cancellation is looked for.
PROGRESS_S = 1.0


class StageRunner:
    """Runs stages for one worker, one at a time. ``stop`` set means: give the job back at the next check.

    ``clock`` is monotonic seconds, used to space heartbeats and to measure, never to judge a lease.
    """

    def __init__(
        self,
        store: JobStore,
        worker_id: str,
        lease_s: float,
        clock: Callable[[], float],
        *,
        heartbeat_s: float | None = None,
        stop: threading.Event | None = None,
        give_up_s: float = GIVE_UP_S,
    ) -> None:
        self._store = store
        self._worker_id = worker_id
        self._lease_s = lease_s
        self._clock = clock
        self._heartbeat_s = heartbeat_s or lease_s / 3
        self._stop = stop or threading.Event()
        self._give_up_s = give_up_s
        self.busy = BusyShare(clock)

    def run(self, job_id: uuid.UUID | str, stage: Stage, work: Work, release_id: Pins = None) -> RunOutcome:
        """Answer one doorbell. ``release_id`` is pinned to the job if it has none yet.

        Does not raise for anything that happens to the job. Raises ``DatabaseUnavailable`` if the claim or,
        for ``give_up_s`` seconds, the end cannot be written: the lease then runs out and the job is tried again.
        """
        job_id, stage = uuid.UUID(str(job_id)), Stage(stage)
        claim = self._store.claim(job_id, stage, self._worker_id, self._lease_s, release_id)
        if claim is None:
            telemetry.DUPLICATE_DELIVERIES.inc()
            return RunOutcome.DUPLICATE
        failpoint("jobs.after_claim")
        begun = self._clock()
        with self.busy, tracing.within(tracing.span(claim.job.traceparent)), telemetry.bind(**facts_of(claim)):
            outcome = self._run(claim, work)
            note_end(claim, outcome, self._clock() - begun)
        return outcome

    def _run(self, claim: Claim, work: Work) -> RunOutcome:
        beat = Beat(self._stop, self._clock)
        ended = threading.Event()
        heart = threading.Thread(target=self._beat, args=(claim, beat, ended), name="heartbeat", daemon=True)
        heart.start()
        try:
            return self._attempt(claim, work, beat)
        except LeaseLost:
            return self._lease_lost()
        finally:
            ended.set()
            beat.wake.set()
            heart.join()

    def _attempt(self, claim: Claim, work: Work, beat: Beat) -> RunOutcome:
        try:
            found = work(claim, beat)
        except LeaseLost:
            raise
        except WorkerStopping as error:
            reason = "gave way" if isinstance(error, GaveWay) else "worker stopping"
            return self._end(claim, lambda held: self._store.release(held, reason))
        except JobCancelled as error:
            if not beat.cancelled:
                return self._failed(claim, error)
            return self._end(claim, self._store.acknowledge_cancel)
        except Exception as error:  # whatever a stage raises ends this attempt, not the worker
            return self._failed(claim, error)
        outcome = found if isinstance(found, Outcome) else Outcome(found)
        failpoint("jobs.before_complete")
        try:
            job = self._persistently(lambda: self._store.complete(claim, outcome.result, outcome.also))
        except (LeaseLost, DatabaseUnavailable):
            raise
        except Exception as error:  # ``also`` refused, or the result is not JSON: nothing was written
            return self._failed(claim, error)
        note_steps(claim.stage, outcome.result)
        failpoint("jobs.after_complete")
        if outcome.after is not None:
            outcome.after()
        return RunOutcome.CANCELLED if job.state is State.CANCELLED else RunOutcome.COMPLETED

    def _beat(self, claim: Claim, beat: Beat, ended: threading.Event) -> None:
        sent, due = beat.counts, self._clock() + self._heartbeat_s
        while True:
            woken = beat.wake.wait(min(PROGRESS_S, self._heartbeat_s))
            beat.wake.clear()
            if ended.is_set():
                return
            if not woken and beat.counts == sent and self._clock() < due:
                # A stage that reports no progress for a while (a model is loaded) must hear of its cancellation, too.
                with suppress(DatabaseUnavailable):
                    beat.cancelled |= self._store.cancel_requested(claim)
                continue
            done, total = sent = beat.counts
            due = self._clock() + self._heartbeat_s
            try:
                beat.cancelled |= self._store.heartbeat(claim, done, total, self._lease_s)
            except LeaseLost as error:
                beat.lost = error
                return
            except DatabaseUnavailable:
                # Nobody can take the lease from us while the database is away: work on, beat again soon.
                log.warning("heartbeat_failed", reason=DatabaseUnavailable.reason)
                if ended.wait(min(1.0, self._heartbeat_s)):
                    return
                beat.wake.set()

    def _failed(self, claim: Claim, error: Exception) -> RunOutcome:
        if isinstance(error, BylineError):
            log.warning("stage_failed", reason=error.reason, error=error.message)
            typed = error
        else:
            # The traceback stays in the log; a client sees the error's kind and an id to quote.
            error_id = uuid.uuid5(claim.job.id, f"{claim.stage}:{claim.fence}").hex[:12]
            log.exception("stage_crashed", error_id=error_id)
            typed = BylineError(
                f"stage {claim.stage} failed unexpectedly (error {error_id})",
                stage=claim.stage,
                error_id=error_id,
                kind=type(error).__name__,
            )
        return self._end(claim, lambda held: self._store.fail(held, typed, is_retryable(error)))

    def _end(self, claim: Claim, write: Callable[[Claim], Job]) -> RunOutcome:
        job = self._persistently(lambda: write(claim))
        if job.state is State.CANCELLED:
            return RunOutcome.CANCELLED
        if job.state is State.QUEUED:
            return RunOutcome.RELEASED if job.attempt < claim.job.attempt else RunOutcome.RETRIED
        return RunOutcome.FAILED

    def _persistently(self, write: Callable[[], T]) -> T:
        """``write``, tried again while the database is away: minutes of work are worth the wait."""
        deadline = self._clock() + self._give_up_s
        while True:
            try:
                return write()
            except DatabaseUnavailable:
                if self._clock() >= deadline:
                    raise
                log.warning("end_of_stage_delayed", reason=DatabaseUnavailable.reason)
                threading.Event().wait(RETRY_WRITE_S)

    @staticmethod
    def _lease_lost() -> RunOutcome:
        telemetry.STALE_FENCE.inc()
        log.warning("lease_lost")
        return RunOutcome.LEASE_LOST


def facts_of(claim: Claim) -> dict[str, Any]:
    """What every log line of a running stage names."""
    job = claim.job
    return {
        "job_id": str(job.id), "project_id": job.project_id, "stage": claim.stage.value, "attempt": job.attempt,
        "fence": claim.fence, "release_id": job.release_id,
    }  # fmt: skip


def note_end(claim: Claim, outcome: RunOutcome, seconds: float) -> None:
    """Count how a claim ended, with waiting and working apart, and log it: one line for each."""
    stage = claim.stage.value
    telemetry.WAIT_SECONDS.labels(stage).observe(claim.waited_s)
    telemetry.STAGE_SECONDS.labels(stage, outcome.value).observe(seconds)
    telemetry.JOBS_COMPLETED.labels(stage, outcome.value).inc()
    log.info("stage_ended", outcome=outcome.value, seconds=round(seconds, 4), waited_s=round(claim.waited_s, 4))
    if (trace := tracing.told()) is not None:
        facts = {f"byline.{name}": value for name, value in facts_of(claim).items() if value is not None}
        failed = outcome in (RunOutcome.FAILED, RunOutcome.RETRIED, RunOutcome.LEASE_LOST)
        tracing.finish(
            tracing.Finished(
                trace, stage, seconds, claim.waited_s, error=outcome.value if failed else "",
                attributes=facts | {"byline.outcome": outcome.value},
            )
        )  # fmt: skip


def note_steps(stage: Stage, result: Mapping[str, Any]) -> None:
    """Observe the steps that a stage timed itself (``timings_ms`` of its result)."""
    for step, value in dict(result.get("timings_ms") or {}).items():
        if step != "total":
            telemetry.STEP_SECONDS.labels(stage.value, step).observe(float(value) / 1e3)
