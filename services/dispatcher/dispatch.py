"""Rings doorbells: from QUEUED rows in Postgres to messages in Redis.

Why it exists: the gateway commits a row and is done; this is what makes a worker notice. Rows are the
outbox, so a crash here, a full Redis or a lost one delays jobs and loses none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from byline import telemetry
from byline.errors import BrokerUnavailable
from byline.failpoints import failpoint
from byline.jobs.outbox import Doorbell
from byline.jobs.states import Stage
from byline.jobs.store import JobStore

log = telemetry.get_logger(__name__)

#: Unanswered doorbells at a time. More would only wait in Redis, where no project's turn and no pause counts;
#: fewer than twice the workers would let one idle. Verification goes before ranking by having the larger share.
IN_FLIGHT: Mapping[Stage, int] = {Stage.LOOKUP: 32, Stage.ESTIMATE: 8, Stage.VERIFY: 4, Stage.RANK: 2}

#: A doorbell unanswered for so long (seconds) is taken for lost and rung again; a doubled one does no harm.
RING_AGAIN_S: Mapping[Stage, float] = {Stage.LOOKUP: 15, Stage.ESTIMATE: 60, Stage.VERIFY: 120, Stage.RANK: 120}

#: Lookup workers hear of new jobs from Postgres and take them by themselves, several at a time. Only a job that has
#: waited so long (seconds), or was tried before, gets a doorbell of its own.
GRACE_S: Mapping[Stage, float] = {Stage.LOOKUP: 0.25}


class Dispatch:
    """One pass at a time: ``step`` rings what is due. ``ring`` sends one doorbell, ``marker`` watches Redis.

    ``redis_is_new`` says once whether Redis has lost what it held since it was last asked; then every
    doorbell out is due again at once instead of after ``ring_again_s``.
    """

    def __init__(
        self,
        store: JobStore,
        ring: Callable[[Doorbell], None],
        redis_is_new: Callable[[], bool],
        *,
        in_flight: Mapping[Stage, int] = IN_FLIGHT,
        ring_again_s: Mapping[Stage, float] = RING_AGAIN_S,
        grace_s: Mapping[Stage, float] = GRACE_S,
    ) -> None:
        self._store = store
        self._ring = ring
        self._redis_is_new = redis_is_new
        self._in_flight = in_flight
        self._ring_again_s = ring_again_s
        self._grace_s = grace_s

    def step(self) -> int:
        """Ring every doorbell that is due; returns how many. Raises ``BrokerUnavailable``, ``DatabaseUnavailable``."""
        due = self._store.take_due(self._in_flight, self._ring_again_s, self._grace_s)
        if due:
            failpoint("dispatcher.after_mark")
        for sent, doorbell in enumerate(due):
            try:
                self._ring(doorbell)
            except BrokerUnavailable:
                self._unsent(due[sent:])
                raise
            failpoint("dispatcher.after_ring")
            telemetry.DISPATCHED.labels(doorbell.stage.value).inc()
        return len(due)

    def check_redis(self) -> int:
        """Ring everything again if Redis was wiped; returns the doorbells lost. Raises as ``step``."""
        if not self._redis_is_new():
            return 0
        lost = self._store.forget_dispatch(None)
        log.warning("redis_is_new", doorbells_lost=lost)
        return lost

    def _unsent(self, doorbells: Sequence[Doorbell]) -> None:
        self._store.forget_dispatch([doorbell.job_id for doorbell in doorbells])
        log.warning("doorbells_not_sent", count=len(doorbells))
