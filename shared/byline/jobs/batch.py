"""Run the short jobs that wait, several to a claim.

Why it exists: ``StageRunner`` answers one doorbell with one claim, one heartbeat thread and one completion; for work of
milliseconds that is most of the cost. Here one claim takes what waits, the work is done job by job (so an answer never
depends on its neighbours), and one statement completes all that went well. Whatever went otherwise ends through
``StageRunner``, job by job.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from byline import telemetry, tracing
from byline.errors import DatabaseUnavailable, LeaseLost
from byline.failpoints import failpoint
from byline.jobs.model import Claim
from byline.jobs.rows import Pins
from byline.jobs.runner import (
    GIVE_UP_S,
    Beat,
    Outcome,
    RunOutcome,
    StageRunner,
    Work,
    facts_of,
    note_end,
    note_steps,
)
from byline.jobs.states import Stage
from byline.jobs.store import JobStore

log = telemetry.get_logger(__name__)

#: A claim takes as many jobs as this much work, by the cost of the last ones: whoever is first waits for the last.
BUDGET_S = 0.02
MOST = 16
#: A batch is kept alive for so long (seconds): a database that is away is waited for, a job that hangs is not.
LONGEST_S = 2 * GIVE_UP_S

@dataclass
class _Worked:
    claim: Claim
    beat: Beat
    span: tracing.Trace
    seconds: float = 0.0
    found: Outcome | None = None
    ended: RunOutcome | None = None


class BatchRunner(StageRunner):
    """As ``StageRunner``, for a stage whose jobs take milliseconds. One thread at a time."""

    def __init__(self, store: JobStore, worker_id: str, lease_s: float, clock: Callable[[], float], **options: Any):
        super().__init__(store, worker_id, lease_s, clock, **options)
        self._mean_s = BUDGET_S
        #: Whether the last claim took as many as it asked for. If not, nothing waited that nobody else was taking.
        self.more_may_wait = False
        self._keeping = threading.Lock()
        self._kept: Sequence[_Worked] | None = None
        self._kept_until = 0.0
        self._heart: threading.Thread | None = None

    def run_waiting(self, stage: Stage, work: Work, release_id: Pins = None) -> int:
        """Claim, work and complete; returns how many jobs were claimed (0: nothing waits).

        Does not raise for anything that happens to a job. Raises ``DatabaseUnavailable`` as ``run`` does.
        """
        most = max(1, min(MOST, int(BUDGET_S / max(self._mean_s, 1e-4))))
        claims = self._store.claim_waiting(stage, self._worker_id, self._lease_s, release_id, most)
        self.more_may_wait = len(claims) == most
        if not claims:
            return 0
        telemetry.CLAIM_JOBS.labels(stage.value).observe(len(claims))
        failpoint("jobs.after_claim")
        with self.busy:
            return self._run_batch(claims, work)

    def _run_batch(self, claims: Sequence[Claim], work: Work) -> int:
        batch = [_Worked(claim, Beat(self._stop, self._clock), tracing.span(claim.job.traceparent)) for claim in claims]
        self._keep(batch)
        try:
            for one in batch:
                self._work_on(one, work)
            self._finish(batch)
        finally:
            with self._keeping:
                self._kept = None
        for one in batch:
            self._note(one)
        return len(batch)

    def _work_on(self, one: _Worked, work: Work) -> None:
        begun = self._clock()
        with _bound(one):
            try:
                one.beat.check()
                found = work(one.claim, one.beat)
                one.found = found if isinstance(found, Outcome) else Outcome(found)
            except Exception as error:  # ends this job's attempt, not the batch
                one.ended = self._ended(one, error)
        one.seconds = self._clock() - begun
        self._mean_s += 0.2 * (one.seconds - self._mean_s)

    def _ended(self, one: _Worked, error: Exception) -> RunOutcome:
        def again(_claim: Claim, _beat: Beat) -> Outcome:
            raise error

        try:
            return self._attempt(one.claim, again, one.beat)
        except LeaseLost:
            return self._lease_lost()

    def _finish(self, batch: Sequence[_Worked]) -> None:
        """Complete together; what is left over, or all if that fails, one by one."""
        done = [(one.claim, one.found.result, one.found.named) for one in batch if one.found is not None]
        written: Collection[uuid.UUID] = ()
        if done:
            failpoint("jobs.before_complete")
            try:
                written = self._persistently(lambda: self._store.complete_last(done))
            except DatabaseUnavailable:
                raise
            except Exception:  # one result that Postgres refuses must not cost the others theirs
                log.exception("batch_not_completed", jobs=len(done))
            failpoint("jobs.after_complete")
        for one in batch:
            if one.found is None:
                continue
            if one.claim.job.id in written:
                one.ended = RunOutcome.COMPLETED
                note_steps(one.claim.stage, one.found.result)
                if one.found.after is not None:
                    one.found.after()
                continue
            found = one.found
            with _bound(one):
                try:
                    one.ended = self._attempt(one.claim, lambda _claim, _beat, found=found: found, one.beat)  # type: ignore[misc]
                except LeaseLost:
                    one.ended = self._lease_lost()

    def _keep(self, batch: Sequence[_Worked]) -> None:
        """Have the leases of ``batch`` extended. The thread outlives the batch: starting one costs a millisecond."""
        with self._keeping:
            self._kept = batch
            self._kept_until = self._clock() + LONGEST_S
            if self._heart is None:
                self._heart = threading.Thread(target=self._beat_all, name="heartbeat", daemon=True)
                self._heart.start()

    def _beat_all(self) -> None:
        """Extend every lease each ``heartbeat_s``; most batches are over before the first time.

        Ends when nothing is to be kept, and when a batch took longer than ``LONGEST_S``: no message's time limit ends
        one that hangs. Its leases then run out, the jobs are given to others, and a doorbell that comes to this worker
        and waits in vain ends the process.
        """
        pause = threading.Event()
        while True:
            pause.wait(self._heartbeat_s)
            with self._keeping:
                batch = self._kept
                if batch is None or self._clock() >= self._kept_until:
                    self._heart = None
                    return
            for one in batch:
                if one.ended is not None or one.beat.lost is not None:
                    continue
                try:
                    one.beat.cancelled |= self._store.heartbeat(one.claim, *one.beat.counts, self._lease_s)
                except LeaseLost as error:
                    one.beat.lost = error
                except DatabaseUnavailable:
                    log.warning("heartbeat_failed", reason=DatabaseUnavailable.reason)

    @staticmethod
    def _note(one: _Worked) -> None:
        with _bound(one):
            note_end(one.claim, one.ended or RunOutcome.RETRIED, one.seconds)


@contextmanager
def _bound(one: _Worked) -> Iterator[None]:
    """Log lines of this job name it and its span."""
    with tracing.within(one.span), telemetry.bind(**facts_of(one.claim)):
        yield
