"""Keep a target number of ranking jobs open, within the operator's budget: the heart of the curation service.

Why it exists: labels must keep coming while anything is unlabelled, without ever filling the slow queue that clients'
verifications share, and stop at once when an operator says so. Open jobs, controls and budget are read from Postgres
at every tick, so several curation services, or a restarted one, never overshoot by more than one job each.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Sequence

from byline.errors import BylineError
from byline.rankings.controls import CurationControl
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
#: Queries the planner chooses from at a time.
POOL = 512


#: Which of a pool to label, so many of them, and their uniform share; ``services.curation.chooser.Chooser`` is one.
Choose = Callable[[Sequence[PlannedQuery], int, float], list[PlannedQuery]]


def first_of_the_plan(pool: Sequence[PlannedQuery], count: int, _uniform_share: float) -> list[PlannedQuery]:
    """No choice at all: the plan's order is random already."""
    return list(pool[:count])


class Curator:
    """``tick`` adds at most one ranking job, of up to ``batch`` queries; ``run`` ticks until asked to stop.

    ``plan`` starts the plan afresh, from the corpus and the stored splits as they are now. ``control`` is what an
    operator allows now, ``allowance`` how many of so many queries the budget permits now. ``samples`` gives up to so
    many drift samples that are not among the known queries; they go first. ``repeat`` asks for labels once more if any
    are due, up to so many, and says whether it did; ``aside`` is done after each tick: measuring, taking in.
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
        choose: Choose = first_of_the_plan,
        pool: int = POOL,
        control: Callable[[], CurationControl] = CurationControl,
        allowance: Callable[[CurationControl, int], int] = lambda _control, count: count,
        samples: Callable[[int, frozenset[tuple[str, int]]], list[PlannedQuery]] = lambda _most, _known: [],
        repeat: Callable[[CurationControl, int], bool] = lambda _control, _most: False,
        aside: Callable[[CurationControl], None] = lambda _control: None,
    ) -> None:
        self._producer = producer
        self._plan = plan
        self._open_jobs = open_jobs
        self._rankings = rankings
        self._target_open = target_open
        self._max_rankings = max_rankings
        self._batch = batch
        self._splits = splits
        self._choose = choose
        self._pool = max(pool, batch) if choose is not first_of_the_plan else batch
        self._control = control
        self._allowance = allowance
        self._samples = samples
        self._repeat = repeat
        self._aside = aside

    def tick(self) -> bool:
        """Enqueue one job if there is room and budget, then do what is to be done beside; True if one was enqueued."""
        control = self._control()
        made = self._produce(control)
        self._aside(control)
        return made

    def _produce(self, control: CurationControl) -> bool:
        left = self._max_rankings - self._rankings()
        if control.paused or left <= 0 or self._open_jobs() >= self._target_open:
            return False
        count = self._allowance(control, min(self._batch, left))
        if count <= 0:
            return False
        if self._repeat(control, count):
            return True
        batch = self._next(count, control)
        if not batch:
            return False
        job_id = self._producer.produce(batch)
        log.info("queries enqueued", job_id=str(job_id), queries=len(batch), seeds=[one.seed for one in batch],
                 chosen_for=[one.chosen_for for one in batch])
        return True

    def _next(self, count: int, control: CurationControl) -> list[PlannedQuery]:
        """The next queries without a label or a job; one whose job ended in vain comes alone."""
        # Read anew and walked from its start each time: a sibling service walks the same plan, items come
        # and go, and a query that failed on the way (database away) or whose job ended in vain comes again.
        known, failed = self._producer.known(), self._producer.failed()
        samples = self._samples(count, known)
        if len(samples) >= count:
            return samples[:count]
        pool: list[PlannedQuery] = []
        for planned in itertools.islice(self._plan(), LOOK_AHEAD):
            key = (planned.prompt, planned.seed)
            if planned.split not in self._splits or key in known:
                continue
            if key in failed:
                if not pool:
                    return [planned]
                continue
            pool.append(planned)
            if len(pool) == self._pool:
                break
        return [*samples, *self._choose(pool, count - len(samples), control.uniform_share)]

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
