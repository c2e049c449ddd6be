"""The arithmetic of the lookup bench, on numbers made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from byline.evaluation.bench_lookup import (
    PARTS,
    Asked,
    Marks,
    arrivals,
    breakdown,
    draw,
    parts_of,
    row_of,
    summary,
    synthetic_features,
)

TIMINGS = {"decode": 1.0, "encode": 20.0, "head": 0.5, "search": 3.0, "total": 24.5}


def test_the_parts_add_up_to_the_whole_call() -> None:
    asked = Asked("j", 10.0, 10.0, 10.1, TIMINGS)
    parts = parts_of(asked, Marks(created=10.01, claimed=10.03, completed=10.06))
    assert sum(parts.values()) == pytest.approx(100.0)
    assert parts["queue"] == pytest.approx(20.0) and parts["encode"] == 20.0
    assert parts["worker"] == pytest.approx(30.0 - 24.5)
    assert set(parts) == set(PARTS)


def test_a_job_that_had_to_wait_for_its_client_is_as_late_as_it_was_due() -> None:
    late = Asked("j", due=1.0, begun=3.0, ended=3.5, timings_ms={})
    assert late.latency_ms == pytest.approx(2500.0)


def test_failures_are_counted_and_do_not_flatter_the_rate() -> None:
    asked = [Asked(str(n), n, n, n + 0.5, {} if n % 2 else None) for n in range(10)]
    row = row_of(asked, clients=1, rate=None)
    assert (row["jobs"], row["failed"]) == (10, 5)
    assert row["jobs_per_s"] == pytest.approx(5 / 9.5)
    assert row["p50_ms"] == pytest.approx(500.0)


def run_of(p50: float, p99: float) -> dict[str, Any]:
    return {"variant": "v", "name": "50/s", "clients": 256, "rate": 50.0, "jobs": 10, "failed": 1,
            "p50_ms": p50, "p90_ms": p50, "p99_ms": p99, "jobs_per_s": 50.0, "cores_used_by_others": 0.1}  # fmt: skip


def test_a_row_is_the_median_of_its_runs_beside_the_best_and_counts_those_within_the_target() -> None:
    row = summary([run_of(30, 90), run_of(10, 40), run_of(12, 60)], target=(15, 50))
    assert (row["p50_ms"], row["p99_ms"], row["best"]["p99_ms"]) == (12, 60, 40)
    assert (row["runs_within_target"], len(row["runs"]), row["failed"], row["jobs"]) == (1, 3, 3, 30)
    assert row["best"]["cores_used_by_others"] == 0.1


def test_means_of_parts_add_up_to_the_mean_call() -> None:
    marks = Marks(0.01, 0.02, 0.05)
    many = [parts_of(Asked("j", 0.0, 0.0, end, TIMINGS), marks) for end in (0.06, 0.08)]
    assert sum(breakdown(many).values()) == pytest.approx(70.0)


def test_synthetic_features_keep_scale_and_are_reproducible() -> None:
    base = np.random.default_rng(0).normal(3.0, [1.0, 10.0], (50, 2)).astype(np.float32)
    drawn = synthetic_features(base, 4000, np.random.default_rng(1))
    assert drawn.shape == (4000, 2) and drawn.dtype == np.float32
    assert np.allclose(drawn.mean(0), base.mean(0), atol=1.0)
    ratio = drawn.std(0) / base.std(0)
    assert (ratio > 0.6).all() and (ratio < 1.3).all()
    assert np.array_equal(drawn, synthetic_features(base, 4000, np.random.default_rng(1)))
    with pytest.raises(ValueError):
        synthetic_features(base[:1], 3, np.random.default_rng(0))


def test_arrivals_come_at_the_rate_asked_for() -> None:
    due = arrivals(50.0, 100.0, np.random.default_rng(0))
    assert len(due) == 5000 and (np.diff(due) >= 0).all()
    assert due[-1] == pytest.approx(100.0, rel=0.1)


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [{"variant": v, "name": "1 client", "p50_ms": 5.0, "p99_ms": 9.0} for v in ("before", "after")]
    assert draw({"rows": rows, "breakdowns": {"after": dict.fromkeys(PARTS, 1.0)}}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
