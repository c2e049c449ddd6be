"""Waiting and working are counted apart, and the steps that a stage timed itself one by one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import structlog
from prometheus_client import REGISTRY

from byline.jobs.model import Claim
from byline.jobs.runner import RunOutcome, facts_of, note_end, note_steps
from byline.jobs.states import Stage


def claim(waited_s: float) -> Claim:
    job = SimpleNamespace(id="j1", project_id="p", attempt=2, release_id="r1")
    return Claim(job=cast(Any, job), stage=Stage.VERIFY, fence=7, worker_id="w", waited_s=waited_s)


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_waiting_and_working_are_counted_apart() -> None:
    working = {"stage": "verify", "outcome": "retried"}
    before = value("byline_wait_seconds_sum", stage="verify"), value("byline_stage_seconds_sum", **working)
    answered = value("byline_stage_seconds_count", stage="verify", outcome="succeeded")
    ended = value("byline_jobs_completed_total", stage="verify", outcome="retried")
    with structlog.testing.capture_logs() as lines:
        note_end(claim(waited_s=40.0), RunOutcome.RETRIED, seconds=2.5)
    assert value("byline_wait_seconds_sum", stage="verify") == pytest.approx(before[0] + 40)
    assert value("byline_stage_seconds_sum", **working) == pytest.approx(before[1] + 2.5)
    assert value("byline_stage_seconds_count", stage="verify", outcome="succeeded") == answered
    assert value("byline_jobs_completed_total", stage="verify", outcome="retried") == ended + 1
    assert lines == [
        {"event": "stage_ended", "log_level": "info", "outcome": "retried", "seconds": 2.5, "waited_s": 40.0}
    ]
    assert facts_of(claim(0.0)) == {
        "job_id": "j1", "project_id": "p", "stage": "verify", "attempt": 2, "fence": 7, "release_id": "r1",
    }  # fmt: skip


def test_each_step_is_counted_and_their_total_is_not() -> None:
    before = value("byline_step_seconds_sum", stage="lookup", step="search")
    note_steps(Stage.LOOKUP, {"timings_ms": {"search": 250.0, "total": 900.0}})
    note_steps(Stage.LOOKUP, {})
    assert value("byline_step_seconds_sum", stage="lookup", step="search") == pytest.approx(before + 0.25)
    assert value("byline_step_seconds_count", stage="lookup", step="total") == 0
