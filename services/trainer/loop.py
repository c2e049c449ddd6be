"""The trainer's loop: look every few seconds whether a refresh is due, and run it.

Why it exists: everything that can go wrong with one refresh (no labels yet, the database away, a broken image) must
leave the loop running and say so, without fitting the same labels again and again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import datetime

from byline.errors import BylineError, DatabaseUnavailable
from byline.telemetry import RELEASES_REJECTED, get_logger
from services.trainer.refresh import RefreshOutcome
from services.trainer.schedule import LastRefresh, Observed, RefreshRule, refresh_due

log = get_logger(__name__)
#: The pause after unexpected errors doubles up to this many poll intervals.
LONGEST_PAUSE = 32
#: What waits to be tidied up (files that somebody still used) is tried again after so many seconds without a refresh.
TIDY_EVERY_S = 30.0


class TrainerLoop:
    """``look`` gives the facts, ``last`` the newest candidate; ``refresh(now, last)`` runs one refresh.

    ``refresh`` gets the newest attempt as this loop knows it, failed ones included, and returns None if there was
    nothing to do after all (another trainer did it). ``tidy`` is called now and then while nothing is due.
    """

    def __init__(self, *, look: Callable[[], Observed], last: Callable[[], LastRefresh | None],
                 refresh: Callable[[datetime, LastRefresh | None], RefreshOutcome | None], rule: RefreshRule,
                 now: Callable[[], datetime], stop: threading.Event, poll_s: float,
                 tidy: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.monotonic) -> None:
        self._look = look
        self._last = last
        self._refresh = refresh
        self._rule = rule
        self._now = now
        self._stop = stop
        self._poll_s = poll_s
        self._tidy = tidy
        self._clock = clock
        self._tidied = clock()
        self._rolled_back_from: str | None = None
        self._failed: LastRefresh | None = None
        self._pauses = 1

    def run(self) -> None:
        """Until ``stop`` is set. A refresh that runs is finished first."""
        while not self._stop.is_set():
            self.step()
            self._stop.wait(self.pause_s)

    @property
    def pause_s(self) -> float:
        """Seconds until the next look: the poll interval, doubled with each unexpected error in a row."""
        return self._poll_s * self._pauses

    def step(self) -> RefreshOutcome | None:
        """Refresh if it is due. Errors are logged; a refresh that failed is tried again when there is more to learn
        from, or after the interval."""
        try:
            seen, last, now = self._look(), self._last(), self._now()
        except DatabaseUnavailable as error:
            log.warning("database_away", error=error.message)
            return None
        except Exception:
            self._crashed("look_crashed")
            return None
        self._say_held(seen)
        # Of two at one time the failure counts (max takes the first): it is the later news of that refresh.
        newest = max((known for known in (self._failed, last) if known), key=lambda known: known.at, default=None)
        if not refresh_due(seen, newest, now, self._rule):
            self._pauses = 1
            self._tidy_up()
            return None
        started = self._clock()
        try:
            outcome = self._refresh(now, newest)
        except BylineError as error:
            # One ranking less than there are: the interval, not only a new ranking, may bring the next try.
            self._failed = LastRefresh(seen.rankings - 1, now)
            log.warning("refresh_failed", reason=error.reason, error=error.message)
            return None
        except Exception:
            self._failed = LastRefresh(seen.rankings - 1, now)
            self._crashed("refresh_crashed")
            return None
        self._pauses = 1
        if outcome is None:
            return None
        self._failed = None
        report(outcome, self._clock() - started)
        return outcome

    def _tidy_up(self) -> None:
        if self._clock() - self._tidied < TIDY_EVERY_S:
            return
        self._tidied = self._clock()
        try:
            self._tidy()
        except BylineError as error:
            log.warning("not_tidied", reason=error.reason, error=error.message)
        except Exception:
            self._crashed("tidying_crashed")

    def _say_held(self, seen: Observed) -> None:
        if seen.rolled_back_from == self._rolled_back_from:
            return
        self._rolled_back_from = seen.rolled_back_from
        if seen.rolled_back_from is not None:
            log.warning("held_by_rollback", rolled_back_from=seen.rolled_back_from,
                        lifted_by="byline releases refresh, or an activation")

    def _crashed(self, event: str) -> None:
        self._pauses = min(2 * self._pauses, LONGEST_PAUSE)
        log.exception(event, retry_s=self.pause_s)


def report(outcome: RefreshOutcome, seconds: float) -> None:
    """Log what became of a candidate, and count refusals."""
    for reason in outcome.decision.reasons:
        RELEASES_REJECTED.labels(reason=reason.partition(":")[0]).inc()
    best = outcome.report.best("raw")
    log.info("refresh_finished", release_id=outcome.release_id, activated=outcome.activated,
             reasons=list(outcome.decision.reasons), head_map=round(outcome.decision.metrics["map"], 4),
             best_raw_map=round(best.result.mean, 4) if best else None, start=outcome.start.value,
             triggers=[one.trigger.value for one in outcome.due],
             seconds=round(seconds, 1))
