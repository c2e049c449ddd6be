"""The dispatcher's loop: woken by changes of jobs, by a slow poll otherwise, and patient with lost servers.

Why it exists: it is the one place that decides *when* to dispatch and reconcile, so ``dispatch`` and
``reconcile`` stay functions of the store and can be tested one step at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from byline import telemetry
from byline.errors import BrokerUnavailable, DatabaseUnavailable
from byline.jobs.store import JobStore
from services.dispatcher.dispatch import Dispatch
from services.dispatcher.reconcile import reconcile

log = telemetry.get_logger(__name__)

#: Seconds between passes when nothing wakes the loop: jobs whose retry is due notify nobody.
POLL_S = 0.5
RECONCILE_EVERY_S = 1.0
LONGEST_PAUSE_S = 2.0


class Loop:
    """Run until ``stop``; set ``wake`` (from any thread) when a job has changed. ``clock`` is monotonic seconds."""

    def __init__(
        self,
        store: JobStore,
        dispatch: Dispatch,
        stop: threading.Event,
        clock: Callable[[], float],
        *,
        poll_s: float = POLL_S,
        reconcile_every_s: float = RECONCILE_EVERY_S,
    ) -> None:
        self._store = store
        self._dispatch = dispatch
        self._stop = stop
        self._clock = clock
        self._poll_s = poll_s
        self._reconcile_every_s = reconcile_every_s
        self.wake = threading.Event()

    def run(self) -> None:
        """Pass after pass. A lost Postgres or Redis is logged once, waited for, and costs nothing but time."""
        next_reconcile = self._clock()
        failures = 0
        while not self._stop.is_set():
            try:
                if self._clock() >= next_reconcile:
                    next_reconcile = self._clock() + self._reconcile_every_s
                    # Postgres first: leases are taken back even while Redis is away.
                    reconcile(self._store)
                    self._dispatch.check_redis()
                self._dispatch.step()
                if failures:
                    log.info("servers_are_back", failed_passes=failures)
                failures = 0
            except (BrokerUnavailable, DatabaseUnavailable) as error:
                failures += 1
                if failures == 1:
                    log.warning("server_away", reason=error.reason, error=error.message)
                self._stop.wait(min(self._poll_s * failures, LONGEST_PAUSE_S))
                continue
            self.wake.wait(self._poll_s)
            self.wake.clear()
