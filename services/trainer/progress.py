"""Shows how far a refresh is: a bar per step on a terminal, else a log line now and then.

Why it exists: a refresh has steps of very different lengths, and a person who waits for a minute wants to see which
one it is at; ``byline.telemetry.progress`` wraps an iterable, which a callback is not.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from byline.telemetry import get_logger

log = get_logger(__name__)
LOG_EVERY_S = 10.0


class StepProgress:
    """Call it with (what, done, total). Use it as a context manager, so that the terminal is left in order."""

    def __init__(self, *, terminal: bool | None = None) -> None:
        on_terminal = sys.stderr.isatty() if terminal is None else terminal
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=Console(stderr=True)) if on_terminal else None
        self._tasks: dict[str, TaskID] = {}
        self._logged_at: dict[str, float] = {}

    def __enter__(self) -> StepProgress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Note that ``done`` of ``total`` parts of the step ``what`` are finished."""
        if self._bars is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=total)
            self._bars.update(self._tasks[what], completed=done, total=total)
            return
        now = time.monotonic()
        if done == total or now - self._logged_at.setdefault(what, now) >= LOG_EVERY_S:
            self._logged_at[what] = now
            log.info("progress", label=what, done=done, total=total)
