"""A clock that can be held still: what training costs, without what watching it costs.

Why it exists: a curve of held-out quality over time needs evaluations in the middle of a training run, and two
trainers watched differently often must still be compared by what they spent on training. CPU seconds stand beside
wall seconds, because the machine does other things as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Spent:
    """``seconds`` of CPU time of this process, all its threads, and ``wall`` seconds."""

    seconds: float
    wall: float


class Stopwatch:
    """Runs from its creation on."""

    def __init__(self, cpu: Callable[[], float] = time.process_time, wall: Callable[[], float] = time.perf_counter
                 ) -> None:
        self._cpu, self._wall = cpu, wall
        self._began = Spent(cpu(), wall())
        self._held = Spent(0.0, 0.0)

    def read(self) -> Spent:
        """What was spent so far, pauses left out."""
        return Spent(self._cpu() - self._began.seconds - self._held.seconds,
                     self._wall() - self._began.wall - self._held.wall)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count. Not to be nested."""
        since = Spent(self._cpu(), self._wall())
        try:
            yield
        finally:
            self._held = Spent(self._held.seconds + self._cpu() - since.seconds,
                               self._held.wall + self._wall() - since.wall)
