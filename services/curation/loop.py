"""Keep a target number of ranking jobs open: the heart of the curation service, without its plumbing.

Why it exists: labels must keep coming while anything is unlabelled, without ever filling the slow
queue that clients' verifications share. The number of open jobs is read from Postgres, so several
curation services, or a restarted one, never overshoot by more than one each.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection, Iterable

from byline.errors import BylineError
from byline.telemetry import get_logger
from services.curation.plan import PlannedQuery
from services.curation.produce import Producer

log = get_logger(__name__)

#: The test split is frozen: it is ranked on the full corpus by the snapshot's command, and a live
#: ranking of a few hundred candidates must not change what releases are judged on.
LIVE_SPLITS = ("train", "validation")
#: How far a tick looks along the plan: a corpus may have no group in a live split at all.
LOOK_AHEAD = 1_000_000
#: The pause after unexpected errors doubles up to this many poll intervals.
LONGEST_PAUSE = 32


class Curator:
    """``tick`` adds at most one ranking job, of up to ``batch`` queries; ``run`` ticks until asked to stop.

    ``plan`` starts the plan afresh, from the corpus and the stored splits as they are now.
    """

    def __init__(
        self,
        producer: Producer,
        plan: Callable[[], Iterable[PlannedQuery]],
        open_jobs: Callable[[], int],
        rankings: Callable[[], int],
        *,
        target_open: int,
        max_rankings: int,
        batch: int = 1,
        splits: Collection[str] = LIVE_SPLITS,
    ) -> None:
        self._producer = producer
        self._plan = plan
        self._open_jobs = open_jobs
        self._rankings = rankings
        self._target_open = target_open
        self._max_rankings = max_rankings
        self._batch = batch
        self._splits = splits

    def tick(self) -> bool:
        """Enqueue one job of up to ``batch`` queries if there is room and budget; True if one was enqueued."""
        budget = self._max_rankings - self._rankings()
        if self._open_jobs() >= self._target_open or budget <= 0:
            return False
        batch = self._next(min(self._batch, budget))
        if not batch:
            return False
        job_id = self._producer.produce(batch)
        log.info("queries enqueued", job_id=str(job_id), queries=len(batch), seeds=[one.seed for one in batch])
        return True

    def _next(self, count: int) -> list[PlannedQuery]:
        """The next queries of the plan without a label or a job; one whose job ended in vain comes alone."""
        # Read anew and walked from its start each time: a sibling service walks the same plan, items come
        # and go, and a query that failed on the way (database away) or whose job ended in vain comes again.
        known, failed = self._producer.known(), self._producer.failed()
        batch: list[PlannedQuery] = []
        for planned in itertools.islice(self._plan(), LOOK_AHEAD):
            key = (planned.prompt, planned.seed)
            if planned.split not in self._splits or key in known:
                continue
            if key in failed:
                if not batch:
                    return [planned]
                continue
            batch.append(planned)
            if len(batch) == count:
                break
        return batch

    def run(self, stop: threading.Event, poll_s: float) -> None:
        """Tick until ``stop`` is set. A typed error (database away, model missing) is logged and retried after
        ``poll_s``, any other (torch, a full disk) with a pause that doubles each time."""
        pause_s = poll_s
        while not stop.is_set():
            again = False
            try:
                again = self.tick()
                pause_s = poll_s
            except BylineError as error:
                log.warning("curation_tick_failed", reason=error.reason, error=error.message)
                pause_s = poll_s
            except Exception:
                pause_s = min(2 * pause_s, LONGEST_PAUSE * poll_s)
                log.exception("curation_tick_crashed", retry_s=pause_s)
            if not again:
                stop.wait(pause_s)
