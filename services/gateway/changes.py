"""Who waits for a change of which job.

Why it exists: thousands of Watch streams share ONE listening database connection. The listener's thread
calls in here; waiting coroutines are woken on the event loop. A lost notification costs a watcher one slow
poll, never the change itself, because a woken watcher always reads the row again.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from byline.db.listen import ANSWERED, JOBS, KEYS, Listener

#: Answers heard of before anybody asked: the worker may be faster than the gateway's own thread.
_REMEMBERED = 4096


class JobChanges:
    """Fans notifications out to subscribers. All methods but the listener's callbacks belong to the event loop.

    ``forget_keys`` is called there when an API key was changed, or news of one may have been missed.
    """

    def __init__(self, forget_keys: Callable[[], None] = lambda: None) -> None:
        self._forget_keys = forget_keys
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._answers: dict[str, set[asyncio.Event]] = {}
        self._answered: OrderedDict[str, None] = OrderedDict()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = threading.Event()
        self._listener: Listener | None = None

    def start(self, database_url: str) -> None:
        """Begin to listen; call on the event loop that the subscribers run on."""
        self._loop = asyncio.get_running_loop()
        self._listener = Listener(database_url, [JOBS, ANSWERED, KEYS], self._stop, self._on_event, self._on_connect)
        self._listener.start()

    def stop(self, within_s: float = 5.0) -> None:
        """Stop listening and wait for the listening thread to end. Not on the event loop."""
        self._stop.set()
        if self._listener is not None:
            self._listener.join(within_s)

    @contextmanager
    def subscribe(self, job_id: uuid.UUID) -> Iterator[asyncio.Event]:
        """An event that is set after every change of the job from now on. Clear it BEFORE reading the row."""
        with _among(self._waiting, str(job_id)) as event:
            yield event

    @contextmanager
    def answer_of(self, job_id: uuid.UUID) -> Iterator[asyncio.Event]:
        """An event that is set when the job's lookup is over, at once if that was heard already."""
        with _among(self._answers, str(job_id)) as event:
            if str(job_id) in self._answered:
                event.set()
            yield event

    @property
    def subscribers(self) -> int:
        """How many streams and waits are open."""
        return sum(len(events) for kind in (self._waiting, self._answers) for events in kind.values())

    def wake(self, job_id: str) -> None:
        """Wake the subscribers of one job."""
        for event in self._waiting.get(job_id, ()):
            event.set()

    def answered(self, job_id: str) -> None:
        """Wake those who wait for the job's first answer."""
        self._answered[job_id] = None
        if len(self._answered) > _REMEMBERED:
            self._answered.popitem(last=False)
        for event in self._answers.get(job_id, ()):
            event.set()

    def wake_all(self) -> None:
        """Wake everybody: notifications may have been missed."""
        for kind in (self._waiting, self._answers):
            for events in kind.values():
                for event in events:
                    event.set()

    def _on_event(self, channel: str, payload: str) -> None:
        if channel == ANSWERED:
            self._on_loop(self.answered, payload)
        elif channel == KEYS:
            self._on_loop(self._forget_keys)
        elif payload in self._waiting:  # mostly nobody watches: spare the loop
            self._on_loop(self.wake, payload)

    def _on_connect(self) -> None:
        self._on_loop(self.wake_all)
        self._on_loop(self._forget_keys)

    def _on_loop(self, callback: object, *arguments: str) -> None:
        loop = self._loop
        if loop is None or self._stop.is_set() or loop.is_closed():
            return
        loop.call_soon_threadsafe(callback, *arguments)  # type: ignore[arg-type]


@contextmanager
def _among(waiting: dict[str, set[asyncio.Event]], key: str) -> Iterator[asyncio.Event]:
    event = asyncio.Event()
    waiting.setdefault(key, set()).add(event)
    try:
        yield event
    finally:
        events = waiting[key]
        events.discard(event)
        if not events:
            del waiting[key]


async def wait(event: asyncio.Event, timeout_s: float) -> None:
    """Return when the event is set or the time is over, whichever comes first."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
