"""How many queries a budget permits."""

from __future__ import annotations

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
        (CurationControl(gpu_share=0.25), Spent(0, 899, 1, HOUR), 8),
        (CurationControl(gpu_share=0.25), Spent(0, 901, 1, HOUR), 0),
        (CurationControl(gpu_share=0.25), Spent(0, 901, 4, HOUR), 8),
        (CurationControl(gpu_share=0.0), Spent(0, 0, 0, HOUR), 0),
    ],
)
def test_the_budget_decides(control: CurationControl, used: Spent, allowed: int) -> None:
    if control.gpu_share == 1.0:
        used = Spent(used.queries, min(used.worker_seconds, HOUR.total_seconds()), used.workers, used.window)
    assert allowance(control, used, 8) == allowed


@pytest.mark.parametrize("rate", [0.1, 1, 7, 500, 100_000])
def test_a_slow_rate_is_counted_over_a_time_in_which_a_batch_fits(rate: float) -> None:
    control = CurationControl(queries_per_hour=rate)
    window = window_of(control, 8)
    assert window >= timedelta(minutes=10)
    assert allowance(control, Spent(0, 0.0, 1, window), 8) == 8
