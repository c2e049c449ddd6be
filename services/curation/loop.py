"""Keep a target number of ranking jobs open: the heart of the curation service, without its plumbing.

Why it exists: labels must keep coming while anything is unlabelled, without ever filling the slow
queue that clients' verifications share. The number of open jobs is read from Postgres, so several
curation services, or a restarted one, never overshoot by more than one each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator

from byline.errors import BylineError
from byline.telemetry import get_logger
from services.curation.plan import PlannedQuery
from services.curation.produce import Producer

log = get_logger(__name__)

#: The test split is frozen: it is ranked on the full corpus by the snapshot's command, and a live
#: ranking of a few hundred candidates must not change what releases are judged on.
LIVE_SPLITS = ("train", "validation")


class Curator:
    """``tick`` adds at most one ranking job; ``run`` ticks until asked to stop."""

    def __init__(
        self,
        producer: Producer,
        plan: Iterable[PlannedQuery],
        open_jobs: Callable[[], int],
        rankings: Callable[[], int],
        *,
        target_open: int,
        max_rankings: int,
        splits: Collection[str] = LIVE_SPLITS,
    ) -> None:
        self._producer = producer
        self._plan: Iterator[PlannedQuery] = iter(plan)
        self._open_jobs = open_jobs
        self._rankings = rankings
        self._target_open = target_open
        self._max_rankings = max_rankings
        self._splits = splits
        self._pending: PlannedQuery | None = None

    def tick(self) -> bool:
        """Enqueue one query if there is room and budget; True if one was enqueued."""
        if self._open_jobs() >= self._target_open or self._rankings() >= self._max_rankings:
            return False
        # Read anew each time: a sibling service walks the same plan. A query stays pending until it is
        # enqueued, so one that failed on the way (database away) is not skipped.
        known = self._producer.known()
        planned = self._pending
        if planned is None or (planned.prompt, planned.seed) in known:
            planned = next(p for p in self._plan if p.split in self._splits and (p.prompt, p.seed) not in known)
        self._pending = planned
        job_id = self._producer.produce(planned)
        self._pending = None
        log.info("query enqueued", job_id=str(job_id), split=planned.split, seed=planned.seed)
        return True

    def run(self, stop: threading.Event, poll_s: float) -> None:
        """Tick until ``stop`` is set. A typed error (database away, model missing) is logged and retried."""
        while not stop.is_set():
            try:
                again = self.tick()
            except BylineError as error:
                log.warning("curation_tick_failed", reason=error.reason, error=error.message)
                again = False
            if not again:
                stop.wait(poll_s)
