"""Who waits for a change of which job.

Why it exists: thousands of Watch streams share ONE listening database connection. The listener's thread
calls in here; waiting coroutines are woken on the event loop. A lost notification costs a watcher one slow
poll, never the change itself, because a woken watcher always reads the row again.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from byline.db.listen import JOBS, Listener


class JobChanges:
    """Fans notifications out to subscribers. All methods but the listener's callbacks belong to the event loop."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = threading.Event()
        self._listener: Listener | None = None

    def start(self, database_url: str) -> None:
        """Begin to listen; call on the event loop that the subscribers run on."""
        self._loop = asyncio.get_running_loop()
        self._listener = Listener(database_url, [JOBS], self._stop, self._on_event, self._on_connect)
        self._listener.start()

    def stop(self) -> None:
        """Stop listening and wait for the listening thread to end. Not on the event loop."""
        self._stop.set()
        if self._listener is not None:
            self._listener.join(timeout=5.0)

    @contextmanager
    def subscribe(self, job_id: uuid.UUID) -> Iterator[asyncio.Event]:
        """An event that is set after every change of the job from now on. Clear it BEFORE reading the row."""
        key = str(job_id)
        event = asyncio.Event()
        self._waiting.setdefault(key, set()).add(event)
        try:
            yield event
        finally:
            waiting = self._waiting[key]
            waiting.discard(event)
            if not waiting:
                del self._waiting[key]

    @property
    def subscribers(self) -> int:
        """How many streams and waits are open."""
        return sum(len(events) for events in self._waiting.values())

    def wake(self, job_id: str) -> None:
        """Wake the subscribers of one job."""
        for event in self._waiting.get(job_id, ()):
            event.set()

    def wake_all(self) -> None:
        """Wake everybody: notifications may have been missed."""
        for events in self._waiting.values():
            for event in events:
                event.set()

    def _on_event(self, channel: str, payload: str) -> None:
        del channel  # only one is listened to
        self._on_loop(self.wake, payload)

    def _on_connect(self) -> None:
        self._on_loop(self.wake_all)

    def _on_loop(self, callback: object, *arguments: str) -> None:
        loop = self._loop
        if loop is None or self._stop.is_set() or loop.is_closed():
            return
        loop.call_soon_threadsafe(callback, *arguments)  # type: ignore[arg-type]


async def wait(event: asyncio.Event, timeout_s: float) -> None:
    """Return when the event is set or the time is over, whichever comes first."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
