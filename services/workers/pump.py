"""Takes lookups as they come, without waiting for a doorbell.

Why it exists: from the gateway's commit through dispatcher, Redis and Celery to this process is three more programs
than a lookup of milliseconds can pay for. Postgres says itself that a job waits (``byline_queued``), so this worker
claims it at once, with whatever else waits. Doorbells stay what they are: they come for jobs that nobody has taken
within the dispatcher's grace, and for those that were tried before. A lost notification costs one poll.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

from byline.errors import DatabaseUnavailable
from byline.telemetry import get_logger

log = get_logger(__name__)

#: Between looks when nothing was heard.
POLL_S = 0.5
#: After an error that is not the job's: a database without tables, a lost connection.
PAUSE_S = 0.5


class Turns:
    """A lock that is given in the order it was asked for.

    A plain lock goes to whoever is awake: the pump, which asks again at once, would keep a doorbell waiting for as long
    as there is work, until the queue's time limit ends a healthy process.
    """

    def __init__(self) -> None:
        self._line: deque[object] = deque()
        self._moved = threading.Condition()

    def __enter__(self) -> None:
        mine = object()
        with self._moved:
            self._line.append(mine)
            try:
                self._moved.wait_for(lambda: self._line[0] is mine)
            except BaseException:  # a signal's exception while waiting must not leave an empty place in the line
                self._line.remove(mine)
                self._moved.notify_all()
                raise

    def __exit__(self, *_: object) -> None:
        with self._moved:
            self._line.popleft()
            self._moved.notify_all()

    def __len__(self) -> int:
        """How many hold or wait for the turn."""
        return len(self._line)


class LookupPump:
    """A thread that calls ``step`` for as long as it says that more may wait, then waits to be woken.

    ``turn`` is held during each step; whoever else works in this process takes it, too.
    """

    def __init__(
        self,
        step: Callable[[], bool | int],
        turn: AbstractContextManager[object],
        stop: threading.Event,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        """``begin`` is called once, on the thread, before the first step."""
        self._step = step
        self._begin = begin
        self._turn = turn
        self._stop = stop
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lookup-pump", daemon=True)

    def start(self) -> None:
        """Begin; ends when ``stop`` is set."""
        self._thread.start()

    def wake(self) -> None:
        """Something may wait. Any thread; cheap."""
        self._wake.set()

    def join(self, timeout_s: float) -> None:
        """Wait for the step in progress; ``stop`` must be set."""
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        self._begin()
        while not self._stop.is_set():
            self._wake.clear()
            try:
                while not self._stop.is_set():
                    with self._turn:
                        if not self._step():
                            break
            except DatabaseUnavailable as error:
                log.warning("waiting_jobs_not_claimed", reason=error.reason)
                self._stop.wait(PAUSE_S)
            except Exception:  # whatever it is, jobs still come by their doorbells; try again
                log.exception("waiting_jobs_not_claimed")
                self._stop.wait(PAUSE_S)
            self._wake.wait(POLL_S)
