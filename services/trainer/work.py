"""One whole piece of a trainer's work: take the turn, end what a dead one left, refresh, answer requests, collect.

Why it exists: the service's loop, ``--once`` and the tests that kill the trainer run exactly this, so that what is
tested is what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol

from sqlalchemy import Engine

from byline.errors import BylineError
from byline.releases.garbage import GarbageCollector, KeepRule
from byline.releases.registry import ReleaseRegistry
from byline.releases.requests import RefreshRequests
from byline.telemetry import get_logger
from services.trainer.labels import Progress
from services.trainer.leftovers import settle_leftovers
from services.trainer.observe import Alarms, Observer
from services.trainer.refresh import RefreshOutcome
from services.trainer.schedule import Due, LastRefresh, Observed, RefreshRule, keeps_head, refresh_due
from services.trainer.turn import my_turn

log = get_logger(__name__)


class Refreshes(Protocol):
    """What fits, judges and publishes; ``services.trainer.refresh.Refresher`` is one."""

    def run_once(self, *, now: datetime, seed: int, due: Sequence[Due] = ..., keep_head: bool = ...,
                 progress: Progress = ...) -> RefreshOutcome:
        """See ``Refresher.run_once``."""
        ...


class TrainerWork:
    """The work on one model. ``refresher`` is built on first use: encoders take seconds and memory."""

    def __init__(
        self, engine: Engine, model_id: str, release_root: Path, observer: Observer, rule: RefreshRule,
        refresher: Callable[[], Refreshes], keep: KeepRule, seed: int = 0, alarms: Alarms | None = None,
        purge: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        """``purge`` removes withdrawn items from whatever the new release does not need any more, and ends what a
        killed purge began."""
        self._purge = purge
        self._engine = engine
        self._model_id = model_id
        self._root = release_root
        self._observer = observer
        self._rule = rule
        self._refresher = refresher
        self._seed = seed
        self._alarms = alarms
        self._registry = ReleaseRegistry(engine)
        self._requests = RefreshRequests(engine)
        self._garbage = GarbageCollector(engine, release_root, keep)

    def run(self, now: datetime, due: Sequence[Due] | None = None, last: LastRefresh | None = None,
            progress: Progress = lambda what, done, total: None) -> RefreshOutcome | None:
        """Refresh for the reasons ``due``; None: look for reasons again, once it is this trainer's turn.

        ``last`` is the newest attempt that the caller knows of; one that failed is in no table.

        Returns None if another trainer of this model is at work, or has just done it. Raises what a refresh raises;
        requests that were waiting are then answered with the error.
        """
        with my_turn(self._engine, self._model_id) as mine:
            if not mine:
                log.info("another_trainer_at_work", model_id=self._model_id)
                return None
            settle_leftovers(self._registry, self._root, self._model_id)
            self._clean(self._purge)
            seen = self._observer.look()
            newest = max(filter(None, (last, self._observer.last())), key=lambda one: one.at, default=None)
            reasons = tuple(due) if due is not None else refresh_due(seen, newest, now, self._rule)
            if not reasons:
                return None
            log.info("refresh_started", triggers=[one.trigger.value for one in reasons],
                     details=[one.detail for one in reasons], rankings=seen.rankings)
            outcome = self._refresh(reasons, seen, now, progress)
            self._clean(self._purge)
            self._clean(lambda: self._garbage.collect(self._model_id, now))
            return outcome

    def tidy(self) -> None:
        """Go on with a purge that had to wait for somebody: a worker that had not swapped yet, a running job."""
        with my_turn(self._engine, self._model_id) as mine:
            if mine:
                self._clean(self._purge)

    def _refresh(self, due: Sequence[Due], seen: Observed, now: datetime, progress: Progress) -> RefreshOutcome:
        asked = [one.request_id for one in seen.asked]
        try:
            outcome = self._refresher().run_once(now=now, seed=self._seed, due=due, keep_head=keeps_head(seen, due),
                                                 progress=progress)
        except BylineError as error:
            self._requests.answer(asked, error=f"{error.reason}: {error.message}")
            raise
        except Exception as error:
            self._requests.answer(asked, error=f"the refresh failed unexpectedly: {type(error).__name__}")
            raise
        self._requests.answer(asked, release_id=outcome.release_id)
        if self._alarms is not None and seen.alarm is not None and outcome.activated and not keeps_head(seen, due):
            self._alarms.answered(seen.alarm, outcome.release_id)
        return outcome

    @staticmethod
    def _clean(step: Callable[[], object]) -> None:
        """Files that are to go; a failure costs disk space and time, not the refresh."""
        try:
            step()
        except (BylineError, OSError) as error:
            log.warning("garbage_not_collected", error=str(error))
