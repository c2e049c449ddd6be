"""How many queries a budget permits."""

from __future__ import annotations

import math
from datetime import timedelta

import pytest

from byline.rankings.controls import CurationControl, Spent, allowance, window_of

HOUR = timedelta(hours=1)


@pytest.mark.parametrize(
    ("control", "used", "allowed"),
    [
        (CurationControl(), Spent(10_000, 1e9, 1, HOUR), 8),  # no limits but those of the workers themselves
        (CurationControl(paused=True), Spent(0, 0, 1, HOUR), 0),
        (CurationControl(queries_per_hour=20), Spent(16, 0, 1, HOUR), 4),
        (CurationControl(queries_per_hour=20), Spent(20, 0, 1, HOUR), 0),
        (CurationControl(queries_per_hour=0), Spent(0, 0, 1, HOUR), 0),
        (CurationControl(gpu_share=0.25), Spent(0, 0, 1, HOUR, 3600, 899), 8),
        (CurationControl(gpu_share=0.25), Spent(0, 0, 1, HOUR, 3600, 901), 0),
        (CurationControl(gpu_share=0.25), Spent(0, 0, 4, HOUR, 3600, 901), 8),
        (CurationControl(gpu_share=0.25), Spent(0, 1e9, 1, HOUR), 8),  # nothing was asked for lately
        (CurationControl(gpu_share=0.0), Spent(0, 0, 0, HOUR), 0),
    ],
)
def test_the_budget_decides(control: CurationControl, used: Spent, allowed: int) -> None:
    assert allowance(control, used, 8) == allowed


@pytest.mark.parametrize("rate", [0.1, 1, 7, 500, 100_000])
def test_a_slow_rate_is_counted_over_a_time_in_which_a_batch_fits(rate: float) -> None:
    control = CurationControl(queries_per_hour=rate)
    window = window_of(control, 8)
    assert window >= timedelta(minutes=10)
    assert allowance(control, Spent(0, 0.0, 1, window), 8) == 8


@pytest.mark.parametrize("batch_s", [5.0, 60.0, 600.0, 1500.0, 20_000.0])  # windows have 600 s
@pytest.mark.parametrize("share", [0.05, 0.25, 0.8])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("target_open", [1, 2])
def test_the_share_of_workers_holds_in_the_long_run_however_long_a_batch_runs(
    batch_s: float, share: float, workers: int, target_open: int
) -> None:
    control, poll = CurationControl(gpu_share=share), 2.0
    spans: list[tuple[float, float]] = []
    free, asked, now = [0.0] * workers, -math.inf, 0.0
    for _ in range(40):
        while True:
            since = sum(max(0.0, min(end, now) - max(begin, asked)) for begin, end in spans)
            used = Spent(0, 0.0, workers, HOUR, now - asked if spans else None, since)
            if sum(end > now for _, end in spans) < target_open and allowance(control, used, 8):
                break
            now += max(poll, batch_s / 50)
        worker = min(range(workers), key=free.__getitem__)
        begin = max(now, free[worker])
        spans.append((begin, begin + batch_s))
        free[worker], asked = begin + batch_s, now
    # From the first question to the last of them nothing but the last ones' own time is not paid for yet.
    busy = sum(max(0.0, min(end, now) - begin) for begin, end in spans)
    assert busy <= share * workers * now + 1e-6
    assert busy > 0.6 * min(share * workers, target_open) * now - 2 * batch_s  # and most of what is allowed is used
