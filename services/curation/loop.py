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


#: (prompt, seed) of queries.
Keys = frozenset[tuple[str, int]]
#: What to label: out of a pool and of queries in the order that chance drew them, how many, and the uniform share;
#: ``services.curation.chooser.Chooser`` is one.
Choose = Callable[[Sequence[PlannedQuery], Sequence[PlannedQuery], int, float], list[PlannedQuery]]


def first_of_the_plan(
    pool: Sequence[PlannedQuery], _by_chance: Sequence[PlannedQuery], count: int, _uniform_share: float
) -> list[PlannedQuery]:
    """No choice at all: the plan's order is random already."""
    return list(pool[:count])


class Curator:
    """``tick`` adds at most one ranking job, of up to ``batch`` queries; ``run`` ticks until asked to stop.

    ``plan`` starts the plan afresh, from the corpus and the stored splits as they are now, and ``by_chance`` the one
    that the uniform share is taken from in its order; ``usable`` passes on what may be asked of either. ``control`` is
    what an operator allows now, ``allowance`` how many of so many queries the budget permits now. From ``max_rankings``
    ``rankings`` on nothing is asked for (0: no limit); ``full`` is told at each tick whether that is so. ``samples``
    gives up to so many drift samples that are not among the known queries; they go first, but never take more than
    half. ``repeat`` asks for labels once more if any are due, up to so many, and says whether it did; ``aside`` is done
    after each tick: measuring, taking in.
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
        by_chance: Callable[[], Iterable[PlannedQuery]] = lambda: (),
        usable: Callable[[Iterable[PlannedQuery]], Iterable[PlannedQuery]] = lambda plan: plan,
        pool: int = POOL,
        control: Callable[[], CurationControl] = CurationControl,
        allowance: Callable[[CurationControl, int], int] = lambda _control, count: count,
        samples: Callable[[int, Keys], list[PlannedQuery]] = lambda _most, _known: [],
        repeat: Callable[[CurationControl, int], bool] = lambda _control, _most: False,
        aside: Callable[[CurationControl], None] = lambda _control: None,
        full: Callable[[bool], None] = lambda _reached: None,
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
        self._by_chance = by_chance
        self._usable = usable
        self._pool = max(pool, batch) if choose is not first_of_the_plan else batch
        self._control = control
        self._allowance = allowance
        self._samples = samples
        self._repeat = repeat
        self._aside = aside
        self._full = full
        self._said = False

    def tick(self) -> bool:
        """Enqueue one job if there is room and budget, then do what is to be done beside; True if one was enqueued."""
        control = self._control()
        made = self._produce(control)
        self._aside(control)
        return made

    def _produce(self, control: CurationControl) -> bool:
        most = self._room()
        if control.paused or most <= 0 or self._open_jobs() >= self._target_open:
            return False
        count = self._allowance(control, most)
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

    def _room(self) -> int:
        """Queries of the next batch before the model has as many rankings as it may have. Says so once if it has."""
        if not self._max_rankings:
            return self._batch
        left = self._max_rankings - self._rankings()
        self._full(left <= 0)
        if left <= 0 and not self._said:
            log.warning("curation_full", max_rankings=self._max_rankings,
                        why="the model has as many rankings as BYLINE_CURATION_MAX_RANKINGS allows: nothing is asked")
        self._said = left <= 0
        return min(self._batch, left)

    def _next(self, count: int, control: CurationControl) -> list[PlannedQuery]:
        """The next queries without a label or a job; one whose job ended in vain comes alone."""
        # Read anew and walked from its start each time: a sibling service walks the same plan, items come
        # and go, and a query that failed on the way (database away) or whose job ended in vain comes again.
        known, failed = self._producer.known(), self._producer.failed()
        samples = self._samples(drift_part(count, len(known)), known)
        drawn = self._unasked(self._by_chance(), known, failed, count)
        pool = self._unasked(self._plan(), known, failed, self._pool)
        for found in (drawn, pool):
            if found and _key(found[0]) in failed:
                return found[:1]
        return [*samples, *self._choose(pool, drawn, count - len(samples), control.uniform_share)]

    def _unasked(self, plan: Iterable[PlannedQuery], known: Keys, failed: Keys, most: int) -> list[PlannedQuery]:
        """Up to ``most`` queries of the plan that need a job; the one at its front alone if that has failed before."""
        found: list[PlannedQuery] = []
        unasked = (planned for planned in itertools.islice(plan, LOOK_AHEAD)
                   if planned.split in self._splits and _key(planned) not in known)  # fmt: skip
        for planned in self._usable(unasked):
            if _key(planned) in failed:
                if not found:
                    return [planned]
                continue
            found.append(planned)
            if len(found) == most:
                break
        return found

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


def drift_part(count: int, asked: int) -> int:
    """How many of ``count`` queries may be drift samples: half, so that heavy traffic does not end all choosing. Of an
    odd number the one in the middle goes to either in turn, by how many were ``asked`` before."""
    return (count + asked % 2) // 2


def _key(planned: PlannedQuery) -> tuple[str, int]:
    return planned.prompt, planned.seed
