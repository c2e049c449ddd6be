"""``python -m byline.chaos.wrong_clock OFFSET RATE MODULE [ARGUMENT …]``: run a program whose clocks are wrong.

Why it exists: leases and deadlines are judged by the database's clock only, and a worker whose own clock is an hour
fast, or runs half again too fast, must neither take nor lose a job by it. ``time.time``, ``time.time_ns``,
``time.monotonic`` and ``datetime.now`` are replaced before the program is imported; C libraries (libpq, Redis' socket
timeouts in the kernel) keep the true time.
"""

from __future__ import annotations

import datetime as dates
import runpy
import sys
import time
from collections.abc import Sequence


def bend(offset_s: float, rate: float) -> None:
    """From now on this process's clocks are ``offset_s`` seconds ahead and run ``rate`` times as fast."""
    true_time, true_monotonic, true_datetime = time.time, time.monotonic, dates.datetime
    begun, begun_monotonic = true_time(), true_monotonic()

    def wrong_time() -> float:
        return begun + offset_s + rate * (true_time() - begun)

    class WrongDatetime(dates.datetime):
        @classmethod
        def now(cls, tz: dates.tzinfo | None = None) -> dates.datetime:  # type: ignore[override]
            return true_datetime.fromtimestamp(wrong_time(), tz)

    time.time = wrong_time
    time.time_ns = lambda: int(wrong_time() * 1e9)
    time.monotonic = lambda: begun_monotonic + offset_s + rate * (true_monotonic() - begun_monotonic)
    dates.datetime = WrongDatetime  # type: ignore[misc]


def main(argv: Sequence[str]) -> None:
    """Bend the clocks, then be the program."""
    bend(float(argv[0]), float(argv[1]))
    sys.argv = list(argv[2:])
    runpy.run_module(argv[2], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
