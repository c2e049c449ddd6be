"""Windows, intervals, and what counts as a fall."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from byline.drift.windows import DriftRule, Measured, falls, mean_of, windows

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
RULE = DriftRule(window=timedelta(days=1), reference_windows=4, tolerance=0.05, minimum=8)


def rows(rng: np.random.Generator, days: float, count: int, mean: float, *, cluster: int = 0, release: str = "r1",
         spread: float = 0.1) -> list[Measured]:
    return [
        Measured(NOW - timedelta(days=days), cluster, release, float(value), 0.5, 0.0)
        for value in rng.normal(mean, spread, size=count)
    ]


def test_the_interval_holds_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(500):
        found = mean_of(rng.normal(0.3, 0.2, size=9).tolist())
        held += found.low <= 0.3 <= found.high
    assert 0.93 <= held / 500 <= 0.985


def test_an_interval_says_how_little_is_known() -> None:
    assert math.isnan(mean_of([]).value)
    one = mean_of([0.5, math.nan])
    assert (one.value, one.n, one.low, one.high) == (0.5, 1, -math.inf, math.inf)


def test_windows_are_the_same_whoever_asks_and_whenever() -> None:
    rng = np.random.default_rng(0)
    every = rows(rng, 0.1, 3, 0.5) + rows(rng, 1.1, 2, 0.7, cluster=1)
    found = windows(every, timedelta(days=1))
    assert [(one.start.hour, one.cluster, one.queries) for one in found] == [(0, None, 3), (0, 0, 3), (0, None, 2),
                                                                             (0, 1, 2)]
    assert found[0].start > found[2].start and found[0].end - found[0].start == timedelta(days=1)
    assert windows(every[:3], timedelta(days=1)) == found[:2]


def test_a_fall_is_seen_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    before = [row for day in (1.5, 2.5, 3.5) for row in rows(rng, day, 20, 0.8)]
    [fall] = [fall for fall in falls(before + rows(rng, 0.5, 20, 0.5), NOW, RULE) if fall.cluster is None]
    assert fall.at_least > 0.05 and fall.now.value == pytest.approx(0.5, abs=0.08)
    alarms = sum(
        bool(falls([*rows(rng, 1.5, 30, 0.8), *rows(rng, 0.5, 12, 0.8)], NOW, RULE)) for _ in range(200)
    )
    assert alarms <= 4


def test_too_few_queries_alarm_nobody() -> None:
    rng = np.random.default_rng(0)
    assert falls(rows(rng, 2, 50, 0.9) + rows(rng, 0.5, 7, 0.1), NOW, RULE) == []


def test_the_fall_of_one_cluster_is_seen_where_the_others_hide_it() -> None:
    rng = np.random.default_rng(0)
    before = [row for cluster in range(5) for row in rows(rng, 2, 30, 0.8, cluster=cluster)]
    now = [row for cluster in range(5) for row in rows(rng, 0.5, 12, 0.8 if cluster else 0.3, cluster=cluster)]
    assert 0 in {fall.cluster for fall in falls(before + now, NOW, RULE)}


def test_a_release_is_not_blamed_for_the_one_it_replaced() -> None:
    rng = np.random.default_rng(0)
    every = rows(rng, 2, 30, 0.8) + rows(rng, 0.6, 20, 0.4, release="r1") + rows(rng, 0.2, 20, 0.8, release="r2")
    assert falls(every, NOW, RULE, release_id="r2") == []
    assert falls(every, NOW, RULE, release_id="r1")
