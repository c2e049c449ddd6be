"""Hot swap: one reference to the release that answers, changed while readers work.

Why it exists: an answer must come from one release from its first line to its last, and a swap must not
make anybody wait. A reader takes a snapshot; a new release is loaded and verified beside the old one, then
one reference changes. If loading fails, the old release goes on serving and the failure is shown.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Generic, Protocol, TypeVar

import structlog

from byline.db.listen import RELEASES, Listener
from byline.errors import BylineError, NoActiveRelease
from byline.releases.registry import ActiveRelease

log = structlog.get_logger(__name__)


class Loaded(Protocol):
    """What a holder holds: anything that knows its release id (``byline.releases.loader.Release``)."""

    @property
    def release_id(self) -> str:
        """The release's name."""


_LONGEST_PAUSE_S = 60.0
#: Longest text of an unexpected error in the fleet view; the log has its traceback.
_SHOWN_CHARACTERS = 300

R = TypeVar("R", bound=Loaded)


@dataclass(frozen=True, slots=True)
class HolderStatus:
    """For the fleet view. ``epoch`` 0 and ``release_id`` None before the first release; ``error`` of the last load.

    ``loading`` is the release that is just being loaded and verified beside the one that answers.
    """

    release_id: str | None
    epoch: int
    loaded_at: datetime | None
    error: str | None
    loading: str | None = None


@dataclass(frozen=True, slots=True)
class Swap:
    """One completed change, with the seconds from noticing it to serving it."""

    release_id: str
    epoch: int
    seconds: float


class _Slot(Generic[R]):
    """A loaded release and how many readers are inside it."""

    __slots__ = ("readers", "release")

    def __init__(self, release: R) -> None:
        self.release = release
        self.readers = 0


class ReleaseHolder(Generic[R]):
    """Holds the active release and, for jobs that are pinned to it, the one before."""

    def __init__(
        self,
        load: Callable[[str], R],
        active: Callable[[], ActiveRelease | None],
        *,
        on_swap: Callable[[Swap], None] | None = None,
        on_release: Callable[[R], None] | None = None,
        on_status: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``load(release_id)`` opens and verifies; ``active()`` reads the registry.

        ``on_swap`` hears of every change; ``on_release(old)`` is called when the last reader left a release
        that is held no longer. ``on_status`` is called when a load begins, and when it failed.
        """
        self._load = load
        self._active = active
        self._on_swap = on_swap
        self._on_release = on_release
        self._on_status = on_status
        self._clock = clock
        self._now = now
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()
        self._current: _Slot[R] | None = None
        self._previous: _Slot[R] | None = None
        self._status = HolderStatus(None, 0, None, None)

    @property
    def status(self) -> HolderStatus:
        """What is served, and why the last load failed if it did."""
        with self._lock:
            return self._status

    @contextmanager
    def current(self) -> Iterator[R]:
        """The active release, unchanged until the block ends. NoActiveRelease before the first one."""
        with self._lock:
            slot = self._current
            if slot is None:
                raise NoActiveRelease("no release is loaded yet; try again in a few seconds")
            slot.readers += 1
        try:
            yield slot.release
        finally:
            self._leave(slot)

    @contextmanager
    def pinned(self, release_id: str) -> Iterator[R]:
        """One particular release: held ones at once, an older one is loaded for this block.

        Raises what ``load`` raises when the older one cannot be opened.
        """
        slot: _Slot[R] | None
        with self._lock:
            slot = next((s for s in (self._current, self._previous) if s and s.release.release_id == release_id), None)
            if slot is not None:
                slot.readers += 1
        if slot is None:
            slot = _Slot(self._load(release_id))
            slot.readers = 1
        try:
            yield slot.release
        finally:
            self._leave(slot)

    def refresh(self) -> bool:
        """Ask which release is active and swap if it changed; True after a swap. Never raises for a bad release.

        A registry that cannot be reached, or a release that cannot be loaded, whatever the reason, leaves the
        old one serving and is shown in ``status``. Concurrent calls wait for each other.
        """
        with self._refreshing:
            begun = self._clock()
            try:
                active = self._active()
                if active is None or (active.epoch == self.status.epoch and self.status.error is None):
                    return False
                if active.release_id == self.status.release_id:
                    self._note(active.epoch, None)
                    return False
                slot = self._held(active.release_id) or self._loaded(active.release_id)
            except BylineError as error:
                log.warning("release_not_loaded", reason=error.reason, error=error.message)
                self._note(self.status.epoch, f"{error.reason}: {error.message}")
                return False
            except Exception as error:  # a database without tables, a library that crashes: serve on, try again
                log.exception("release_not_loaded")
                self._note(self.status.epoch, _shown(error))
                return False
            self._swap(slot, active)
            seconds = self._clock() - begun
        log.info("release_swapped", release_id=active.release_id, epoch=active.epoch, seconds=round(seconds, 3))
        if self._on_swap:
            self._on_swap(Swap(active.release_id, active.epoch, seconds))
        return True

    def watch(self, stop: threading.Event, database_url: str, poll_s: float = 2.0,
              begin: Callable[[], None] = lambda: None) -> threading.Thread:
        """Start a daemon thread that refreshes on every notification, after every reconnect, and every ``poll_s``.

        ``begin`` is called on the thread first: it loads releases, and may step back behind those who answer.
        While a release cannot be loaded the pause grows to a minute: verifying it reads all of its files.
        """
        wake = threading.Event()
        listener = Listener(database_url, [RELEASES], stop, lambda _channel, _payload: wake.set(), wake.set)

        def run() -> None:
            begin()
            pause = poll_s
            while not stop.is_set():
                wake.clear()
                try:
                    self.refresh()
                except Exception as error:  # a callback's fault must not end the watch
                    log.exception("release_watch_failed")
                    self._note(self.status.epoch, _shown(error))
                pause = poll_s if self.status.error is None else max(poll_s, min(2 * pause, _LONGEST_PAUSE_S))
                self._wait(wake, stop, pause)
            listener.join()

        listener.start()
        thread = threading.Thread(target=run, name="byline-release-watch", daemon=True)
        thread.start()
        return thread

    @staticmethod
    def _wait(wake: threading.Event, stop: threading.Event, seconds: float) -> None:
        """Until woken, stopped, or the time is over; a stop is noticed within half a second."""
        deadline = time.monotonic() + seconds
        while not stop.is_set() and (left := deadline - time.monotonic()) > 0:
            if wake.wait(min(left, 0.5)):
                return

    def _loaded(self, release_id: str) -> _Slot[R]:
        with self._lock:
            self._status = replace(self._status, loading=release_id)
        self._tell()
        return _Slot(self._load(release_id))

    def _tell(self) -> None:
        if self._on_status:
            self._on_status()

    # -- slots ----------------------------------------------------------------------------------

    def _held(self, release_id: str) -> _Slot[R] | None:
        """A rollback finds the release before this one still loaded."""
        with self._lock:
            return self._previous if self._previous and self._previous.release.release_id == release_id else None

    def _swap(self, slot: _Slot[R], active: ActiveRelease) -> None:
        with self._lock:
            dropped = self._previous if self._previous is not slot else None
            self._previous, self._current = self._current, slot
            self._status = HolderStatus(active.release_id, active.epoch, self._now(), None)
            unused = dropped is not None and dropped.readers == 0
        if dropped is not None and unused:
            self._dispose(dropped)

    def _leave(self, slot: _Slot[R]) -> None:
        with self._lock:
            slot.readers -= 1
            unused = slot.readers == 0 and slot is not self._current and slot is not self._previous
        if unused:
            self._dispose(slot)

    def _dispose(self, slot: _Slot[R]) -> None:
        if self._on_release:
            self._on_release(slot.release)

    def _note(self, epoch: int, error: str | None) -> None:
        with self._lock:
            before = self._status
            self._status = HolderStatus(before.release_id, epoch, before.loaded_at, error)
        if before != self._status:
            self._tell()


def _shown(error: Exception) -> str:
    """An unexpected error as the fleet view shows it."""
    return f"{type(error).__name__}: {error}"[:_SHOWN_CHARACTERS]
