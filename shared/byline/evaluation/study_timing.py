"""p50 and p99 of several calls, taken in turn so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np


def interleaved(
    calls: Mapping[str, Callable[[int], object]], rounds: int, warm: int = 3
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Milliseconds {name: {p50, p99}}; each call gets the number of the round. ``warm`` rounds are not counted."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm + rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call(turn)
            if turn >= warm:
                spent[name].append(1e3 * (time.perf_counter() - started))
    return {n: {"p50": float(np.percentile(t, 50)), "p99": float(np.percentile(t, 99))} for n, t in spent.items()}
