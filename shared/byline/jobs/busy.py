"""How much of its time a worker spends in stages.

Why it exists: the sum of working times is known only once a stage has ended, so a verification of minutes shows as rest
and then as more than one can work. This share counts the stage that runs, too.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

#: Long enough to be steady, short enough to scale by.
WINDOW_S = 60.0


class BusyShare:
    """Time within the ``with`` block over time, of the last ``window_s`` seconds. ``clock`` is monotonic seconds.

    One thread at a time may be within; any may ask.
    """

    def __init__(self, clock: Callable[[], float], window_s: float = WINDOW_S) -> None:
        self._clock = clock
        self._window_s = window_s
        self._born = clock()
        self._begun: float | None = None
        self._spans: deque[tuple[float, float]] = deque()
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self._begun = self._clock()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            now = self._clock()
            if self._begun is not None:
                self._spans.append((self._begun, now))
            self._begun = None
            self._forget(now - self._window_s)

    def ratio(self) -> float:
        """Between 0 (it rested) and 1 (it never did)."""
        with self._lock:
            now = self._clock()
            start = max(self._born, now - self._window_s)
            self._forget(start)
            spans = [*self._spans, *([] if self._begun is None else [(self._begun, now)])]
            busy = sum(end - max(begun, start) for begun, end in spans)
        return busy / (now - start) if now > start else 0.0

    def _forget(self, before: float) -> None:
        while self._spans and self._spans[0][1] <= before:
            self._spans.popleft()
