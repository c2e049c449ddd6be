"""The collector tells what Postgres and Redis hold, and says which of them is away instead of repeating old numbers."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine, text

from byline.db import make_engine
from byline.errors import DatabaseUnavailable
from byline.jobs import NewJob, Stage
from byline.jobs.store import JobStore
from byline.queue import enqueue, make_celery
from services.dispatcher import collector
from services.dispatcher.collector import QUERIES, SystemCollector

_WORKER = text(
    "INSERT INTO worker_reports (worker_id, service, queue, release_id, error, pid, last_seen)"
    " VALUES (:id, 'workers', 'lookup', :release, :error, 1, now() - make_interval(secs => :silent))"
)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = make_engine(database_url, pool_size=3)
    yield engine
    engine.dispose()


@pytest.fixture
def registry(engine: Engine, redis_url: str, tmp_path: Path) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(SystemCollector(engine, redis_url, {"releases": tmp_path, "blobs": tmp_path / "none yet"}))
    return registry


def new_job(request_id: str) -> NewJob:
    return NewJob(project_id="p", request_id=request_id, model_id="m", prompt="a cat", image_sha256="0" * 64,
                  max_attempts=1)  # fmt: skip


def test_depth_wait_and_dead_jobs_are_read_from_the_database(
    registry: CollectorRegistry, engine: Engine, redis_url: str
) -> None:
    store = JobStore(engine, {})
    waiting, running, dying = (store.create(new_job(name))[0] for name in ("waits", "runs", "dies"))
    assert store.claim(running.id, Stage.LOOKUP, "w", 30.0)
    doomed = store.claim(dying.id, Stage.LOOKUP, "w", 30.0)
    assert doomed is not None and doomed.waited_s >= 0
    store.fail(doomed, DatabaseUnavailable("broken"), retry=True)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE jobs DISABLE TRIGGER USER"))
        connection.execute(
            text("UPDATE jobs SET update_time = now() - interval '90 s' WHERE id = :id"), {"id": waiting.id}
        )
    store.set_paused(Stage.VERIFY, True)
    enqueue(make_celery(redis_url), uuid.uuid4(), Stage.VERIFY)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert value("byline_database_up") == value("byline_redis_up") == 1
    assert value("byline_jobs", stage="lookup", state="QUEUED") == 1
    assert value("byline_jobs", stage="lookup", state="RUNNING") == 1
    assert value("byline_dead_jobs", stage="lookup") == 1 and value("byline_dead_jobs", stage="verify") == 0
    assert 90 <= (value("byline_oldest_queued_seconds", stage="lookup") or 0) < 900
    assert 90 <= (value("byline_dispatch_lag_seconds", stage="lookup") or 0) < 900
    assert value("byline_stage_paused", stage="verify") == 1 and value("byline_stage_paused", stage="lookup") == 0
    assert value("byline_broker_messages", queue="verification") == 1
    assert (value("byline_disk_free_bytes", folder="releases") or 0) > 0
    store.retry_dead(dying.id)
    assert value("byline_dead_jobs", stage="lookup") == 0


def test_a_claim_knows_how_long_its_job_has_waited(engine: Engine) -> None:
    store = JobStore(engine, {})
    first, second = (store.create(new_job(name))[0] for name in ("by doorbell", "without"))
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE jobs DISABLE TRIGGER USER"))
        connection.execute(text("UPDATE jobs SET update_time = now() - interval '70 s'"))
    held = store.claim(first.id, Stage.LOOKUP, "w", 30.0)
    (other,) = store.claim_waiting(Stage.LOOKUP, "w", 30.0, "r1", 5)
    assert held is not None and other.job.id == second.id
    assert 70 <= held.waited_s < 900 and 70 <= other.waited_s < 900


def test_workers_are_counted_while_they_live_and_skew_is_seen(registry: CollectorRegistry, engine: Engine) -> None:
    with engine.begin() as connection:
        for worker, release, error, silent in (
            ("old", "r1", None, 0), ("new", "r2", None, 0), ("none", None, "no disk", 0), ("dead", "r1", None, 900),
        ):  # fmt: skip
            connection.execute(_WORKER, {"id": worker, "release": release, "error": error, "silent": silent})
            if release is not None:
                serves = text("INSERT INTO worker_releases (worker_id, model_id, release_id) VALUES (:id, 'm', :r)")
                connection.execute(serves, {"id": worker, "r": release})
    assert registry.get_sample_value("byline_workers", {"queue": "lookup"}) == 3
    assert registry.get_sample_value("byline_workers", {"queue": "verification"}) == 0
    assert registry.get_sample_value("byline_workers_with_errors", {"queue": "lookup"}) == 1
    assert registry.get_sample_value("byline_release_skew_workers") == 0  # nothing is active, so nobody is behind
    with engine.begin() as connection:
        for release in ("r1", "r2"):
            connection.execute(
                text("INSERT INTO releases (id, model_id, state, directory, manifest, metrics)"
                     " VALUES (:id, 'm', 'VALIDATED', '/', '{}', '{\"map\": 0.5}')"), {"id": release})  # fmt: skip
        connection.execute(text("INSERT INTO active_releases (model_id, release_id) VALUES ('m', 'r2')"))
    assert registry.get_sample_value("byline_release_skew_workers") == 2  # "old", and the one that has none
    assert registry.get_sample_value("byline_active_release_info", {"model_id": "m", "release_id": "r2"}) == 1
    assert registry.get_sample_value("byline_release_map", {"model_id": "m", "release_id": "r2"}) == 0.5


def test_a_metric_that_takes_too_long_is_missing_alone(
    registry: CollectorRegistry, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "STATEMENT_MS", 150)
    JobStore(engine, {}).create(new_job("waits"))
    with engine.begin() as connection:
        connection.execute(text("LOCK TABLE rankings IN ACCESS EXCLUSIVE MODE"))
        told = scraped(registry)
    assert told["byline_database_up",] == 1 and told["byline_jobs", "lookup", "QUEUED"] == 1
    assert not_told(told) == {"byline_label_set_size", "byline_label_age_seconds"}
    assert not {name for name, *_ in told} & not_told(told)
    assert not_told(scraped(registry)) == set()


def test_a_scrape_ends_in_time_however_slow_postgres_is(engine: Engine, redis_url: str) -> None:
    """Each look at the clock takes a second here: what no time is left for is said to be missing."""
    registry = CollectorRegistry()
    seconds = itertools.count()
    registry.register(SystemCollector(engine, redis_url, {}, clock=lambda: float(next(seconds))))
    told = scraped(registry)
    asked = ["byline_jobs", *list(QUERIES)[: int(collector.BUDGET_S) - 2]]
    assert not_told(told) == set(QUERIES) - set(asked)
    assert told["byline_database_up",] == 1 and {name for name, *_ in told} & set(QUERIES) <= set(asked)


def scraped(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """One scrape: value by name and labels."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for metric in registry.collect()
        for sample in metric.samples
    }


def not_told(scrape: dict[tuple[str, ...], float]) -> set[str]:
    return {name[1] for name, value in scrape.items() if name[0] == "byline_scrape_failed" and value == 1}


def test_a_server_that_is_away_is_said_to_be_and_nothing_old_is_repeated(tmp_path: Path) -> None:
    engine = make_engine("postgresql://nobody@127.0.0.1:1/none", pool_size=1)
    registry = CollectorRegistry()
    registry.register(SystemCollector(engine, "redis://127.0.0.1:1/0", {}))
    names = {metric.name for metric in registry.collect()}
    assert registry.get_sample_value("byline_database_up") == registry.get_sample_value("byline_redis_up") == 0
    assert not names & set(QUERIES)
