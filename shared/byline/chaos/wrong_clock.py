"""``python -m byline.chaos.wrong_clock OFFSET RATE MODULE [ARGUMENT …]``: run a program whose clocks are wrong.

Why it exists: leases and deadlines are judged by the database's clock only, and a worker whose own clock is an hour
fast, or runs half again too fast, must neither take nor lose a job by it. ``time.time``, ``time.time_ns`` and
``time.monotonic`` are replaced before the program is imported, which reaches all Python code that asks them (ours,
Celery's, kombu's, redis-py's); C code (``datetime.now``, libpq, waits in the kernel) keeps the true time.
"""

from __future__ import annotations

import runpy
import sys
import time
from collections.abc import Sequence


def bend(offset_s: float, rate: float) -> None:
    """From now on this process's clocks are ``offset_s`` seconds ahead and run ``rate`` times as fast."""
    true_time, true_monotonic = time.time, time.monotonic
    begun, begun_monotonic = true_time(), true_monotonic()

    def wrong_time() -> float:
        return begun + offset_s + rate * (true_time() - begun)

    time.time = wrong_time
    time.time_ns = lambda: int(wrong_time() * 1e9)
    time.monotonic = lambda: begun_monotonic + offset_s + rate * (true_monotonic() - begun_monotonic)


def main(argv: Sequence[str]) -> None:
    """Bend the clocks, then be the program."""
    bend(float(argv[0]), float(argv[1]))
    sys.argv = list(argv[2:])
    runpy.run_module(argv[2], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
