"""The share of time in stages counts the stage that runs, forgets what is long past, and never leaves 0 to 1."""

from __future__ import annotations

import pytest

from byline.jobs.busy import BusyShare


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_stage_that_still_runs_counts(clock: Clock) -> None:
    share = BusyShare(clock, window_s=60.0)
    assert share.ratio() == 0.0
    clock.now += 10
    with share:
        clock.now += 30
        assert share.ratio() == pytest.approx(30 / 40)
        clock.now += 600
        assert share.ratio() == 1.0
    assert share.ratio() == 1.0


def test_only_the_last_window_counts(clock: Clock) -> None:
    share = BusyShare(clock, window_s=60.0)
    for _ in range(100):  # a second of work, a second of rest
        with share:
            clock.now += 1
        clock.now += 1
    assert share.ratio() == pytest.approx(0.5)
    assert len(share._spans) <= 31
    clock.now += 45
    assert share.ratio() == pytest.approx(7 / 60, abs=0.01)
    clock.now += 100
    assert share.ratio() == 0.0


def test_a_stage_that_raises_has_ended(clock: Clock) -> None:
    share = BusyShare(clock, window_s=60.0)
    with pytest.raises(RuntimeError), share:
        clock.now += 30
        raise RuntimeError
    clock.now += 30
    assert share.ratio() == pytest.approx(0.5)
