"""The fleet view: one row per live worker, true to what it serves."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text

from byline.db import make_engine
from services.workers.report import WorkerReports, WorkerState


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = make_engine(database_url, 3)
    yield made
    made.dispose()


def rows(engine: Engine) -> list[dict[str, object]]:
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(text("SELECT * FROM worker_reports")).mappings()]


def test_a_beat_changes_last_seen_and_only_a_new_release_changes_loaded_at(engine: Engine) -> None:
    state = WorkerState("r1")
    reports = WorkerReports(engine, "w1", queue="lookup", pid=7, state=lambda: state)
    reports.write()
    first = rows(engine)[0]
    reports.write()
    second = rows(engine)[0]
    state = WorkerState("r2", error="r3 could not be loaded")
    reports.write()
    third = rows(engine)[0]
    assert first["loaded_at"] == second["loaded_at"] != third["loaded_at"]
    assert first["last_seen"] < second["last_seen"] < third["last_seen"]  # type: ignore[operator]
    assert (third["release_id"], third["error"], third["pid"], third["queue"]) == (
        "r2", "r3 could not be loaded", 7, "lookup",
    )  # fmt: skip
    assert first["started_at"] == third["started_at"]


def test_a_worker_without_a_release_has_no_loading_time(engine: Engine) -> None:
    WorkerReports(engine, "w1", queue="verification", pid=7, state=WorkerState).write()
    assert rows(engine)[0]["loaded_at"] is None


def test_a_worker_that_leaves_takes_its_row_and_a_change_is_written_at_once(engine: Engine) -> None:
    asked = threading.Semaphore(0)
    state = WorkerState("r1")

    def report() -> WorkerState:
        asked.release()
        return state

    reports = WorkerReports(engine, "w1", queue="lookup", pid=7, state=report)
    reports.start(every_s=3600.0)
    assert asked.acquire(timeout=10)
    reports.changed()
    assert asked.acquire(timeout=10)
    reports.stop()
    assert rows(engine) == []


def test_rows_of_long_dead_workers_are_forgotten_when_a_new_one_starts(engine: Engine) -> None:
    WorkerReports(engine, "dead", queue="lookup", pid=1, state=WorkerState).write()
    with engine.begin() as connection:
        connection.execute(text("UPDATE worker_reports SET last_seen = now() - interval '2 days'"))
    written = threading.Semaphore(0)

    def report() -> WorkerState:
        written.release()
        return WorkerState()

    reports = WorkerReports(engine, "new", queue="lookup", pid=2, state=report)
    reports.start(every_s=3600.0)
    assert written.acquire(timeout=10)
    reports.changed()
    assert written.acquire(timeout=10)  # the second beat comes after the first one's clean-up
    names = [row["worker_id"] for row in rows(engine)]
    reports.stop()
    assert names == ["new"]
