"""Notices a worker that runs, reports itself and answers pings, and takes no message any more.

Why it exists: after a lost connection a Celery consumer may stay up and consume nothing (celery #8030, #10205, #10302),
and a parent process that hangs leaves a child that looks alive in every report. So the child sends itself a message
through Redis, by the same connection, event loop and pool as its doorbells: if it does not come back, although nothing
was being worked on, twice in a row, this worker is deaf. It says so, gives back what it holds, and ends: whoever
supervises it starts another. While Redis is away nothing is judged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from byline import telemetry
from byline.errors import BrokerUnavailable
from byline.telemetry import get_logger

log = get_logger(__name__)

#: Canaries in a row that must be missed: one alone may have gone with a Redis that was wiped.
MISSES = 2


class Canary:
    """Sends through ``send`` every ``every_s`` seconds when idle and waits as long for each to come back.

    ``deaf`` is called once, when two in a row did not. ``clock`` is monotonic seconds. All methods may be called from
    any thread; ``run`` on one of its own.
    """

    def __init__(
        self, send: Callable[[], None], deaf: Callable[[], None], clock: Callable[[], float], every_s: float
    ) -> None:
        self._send = send
        self._deaf = deaf
        self._clock = clock
        self._every_s = every_s
        self._lock = threading.Lock()
        self._busy = 0
        self._sent_at: float | None = None
        self._due_at = clock()
        self._missed = 0

    def came_back(self) -> None:
        """A canary was consumed."""
        with self._lock:
            self._sent_at, self._missed = None, 0
            self._due_at = self._clock() + self._every_s

    @contextmanager
    def working(self) -> Iterator[None]:
        """While a doorbell is answered no canary can come: it is behind it in the line."""
        with self._lock:
            self._busy += 1
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1
                self._missed = 0  # a doorbell came: it consumes
                if self._sent_at is not None:
                    self._sent_at = self._clock()

    def step(self) -> bool:
        """Look once, send if it is time; returns whether this worker is deaf."""
        now = self._clock()
        with self._lock:
            if self._busy:
                return False
            if self._sent_at is not None:
                if now - self._sent_at < self._every_s:
                    return False
                self._sent_at, self._due_at = None, now
                self._missed += 1
                telemetry.CANARIES_MISSED.inc()
                log.warning("canary_missed", in_a_row=self._missed)
                if self._missed >= MISSES:
                    return True
            if now < self._due_at:
                return False
            self._sent_at = now  # before it is sent: it may be back before ``send`` returns
        try:
            self._send()
        except BrokerUnavailable:
            with self._lock:
                self._sent_at, self._missed, self._due_at = None, 0, now + self._every_s
        return False

    def run(self, stop: threading.Event) -> None:
        """Look until ``stop`` is set or the worker is found deaf."""
        while not stop.wait(min(1.0, self._every_s / 4)):
            if self.step():
                log.error("consumes_nothing", canaries_missed=MISSES, every_s=self._every_s)
                self._deaf()
                return
