"""The doctor finds what is wrong: each check is shown a healthy thing and a sick one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import Engine, text
from typer.testing import CliRunner

from byline.config import Settings, load_settings
from byline.db import make_engine, transaction
from byline.doctor import Finding, Level, broker, database, examine, files, fleet, worst
from byline.jobs import Stage
from byline.jobs.store import JobStore
from byline.releases.manifest import REQUIRED_FILES, LabelSet, ReleaseManifest, file_entry


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = make_engine(database_url, pool_size=2)
    yield engine
    engine.dispose()


def found(findings: Finding | list[Finding]) -> dict[str, Level]:
    many = findings if isinstance(findings, list) else [findings]
    return {finding.check: finding.level for finding in many}


def settings(database_url: str, redis_url: str, folder: Path) -> Settings:
    return load_settings(
        database_url=database_url, redis_url=redis_url, state_dir=folder, grpc_address="127.0.0.1:1",
    )  # fmt: skip


def test_a_database_that_does_not_flush_is_a_failure_and_says_what_to_set(engine: Engine) -> None:
    with transaction(engine) as connection:  # the tests' server runs with all three off
        sick = database.durability(connection)
        connection.execute(text("SET LOCAL synchronous_commit = on"))
        better = database.durability(connection)
        connection.execute(text("SET LOCAL synchronous_commit = remote_write"))
        assert found(database.durability(connection))["postgres.synchronous_commit"] is Level.OK
    assert set(found(sick).values()) == {Level.FAILURE} and all("set it to on" in finding.advice for finding in sick)
    assert found(better)["postgres.synchronous_commit"] is Level.OK


def test_a_schema_behind_or_ahead_of_this_program_is_a_failure(engine: Engine) -> None:
    with engine.connect() as connection:
        assert found(database.migrations(connection)) == {"postgres.migrations": Level.OK}
        for revision, advice in (("0003", "restart a gateway"), ("9999", "upgrade the program")):
            connection.execute(text("UPDATE alembic_version SET version_num = :r"), {"r": revision})
            finding = database.migrations(connection)
            assert finding.level is Level.FAILURE and advice in finding.advice
        connection.rollback()


def test_clocks_that_are_apart_are_noticed_and_the_way_to_the_server_is_not(engine: Engine) -> None:
    with transaction(engine) as connection:

        def apart(seconds: float) -> Level:
            return database.clock(connection, lambda: datetime.now(UTC) + timedelta(seconds=seconds)).level

        assert [apart(0), apart(8), apart(-3600)] == [Level.OK, Level.WARNING, Level.FAILURE]
        times = iter([datetime.now(UTC), datetime.now(UTC) + timedelta(seconds=20)])
        assert database.clock(connection, lambda: next(times)).level is Level.OK  # a slow network, no skew


def test_a_redis_that_evicts_forgets_or_fills_up_is_found(redis_url: str) -> None:
    client: Any = redis.Redis.from_url(redis_url, decode_responses=True)
    before = client.config_get("maxmemory-policy"), client.config_get("appendonly")
    try:
        assert set(found(broker.broker(redis_url)).values()) == {Level.OK}
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("appendonly", "no")
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 1_000)
        sick = found(broker.broker(redis_url))
    finally:
        client.config_set("maxmemory", 0)
        for configured in before:
            for name, value in configured.items():
                client.config_set(name, value)
        client.close()
    assert sick == {
        "redis": Level.OK, "redis.policy": Level.FAILURE, "redis.persistence": Level.WARNING,
        "redis.memory": Level.WARNING,
    }  # fmt: skip
    assert found(broker.broker("redis://127.0.0.1:1/0")) == {"redis": Level.FAILURE}


def test_times_that_do_not_fit_each_other_are_found(redis_url: str) -> None:
    assert set(found(broker.timeouts(redis_url, 30.0, 10.0)).values()) == {Level.OK}
    assert found(broker.timeouts(redis_url, 30.0, 20.0))["timeouts.lease"] is Level.WARNING


def test_a_damaged_active_release_is_a_failure_and_a_damaged_previous_one_a_warning(
    engine: Engine, tmp_path: Path
) -> None:
    for release_id in ("r1", "r2"):
        folder = tmp_path / release_id
        folder.mkdir()
        for name in REQUIRED_FILES:
            (folder / name).write_bytes(release_id.encode())
        manifest = ReleaseManifest(
            release_id=release_id, model_id="m", model_revision="v", corpus_id="c", parent=None,
            created_at=datetime(2026, 1, 1, tzinfo=UTC), feature_spec="minilm", preprocessing_hash="p", feature_dim=8,
            embedding_dim=4, items=1, index_factory="Flat", teacher_id="abu_plus",
            labels=LabelSet(queries=3, digest="d"), metrics={"map": 0.5},
            files={name: file_entry(folder / name) for name in REQUIRED_FILES},
        )  # fmt: skip
        with engine.begin() as connection:
            connection.execute(
                text("INSERT INTO releases (id, model_id, state, directory, manifest)"
                     " VALUES (:id, 'm', 'VALIDATED', :directory, CAST(:manifest AS jsonb))"),
                {"id": release_id, "directory": str(folder), "manifest": json.dumps(manifest.to_json())},
            )  # fmt: skip
    with transaction(engine) as connection:
        assert found(files.releases(connection)) == {"releases": Level.SKIPPED}
        connection.execute(
            text("INSERT INTO active_releases (model_id, release_id, previous_release_id) VALUES ('m', 'r2', 'r1')")
        )
        assert set(found(files.releases(connection)).values()) == {Level.OK}
        for release_id in ("r1", "r2"):
            (tmp_path / release_id / REQUIRED_FILES[0]).write_bytes(b"XX")
        sick = found(files.releases(connection))
    assert sick == {"releases.m.active": Level.FAILURE, "releases.m.previous": Level.WARNING}


def test_missing_failing_and_forgotten_workers_and_stages_are_found(engine: Engine) -> None:
    JobStore(engine, {}).set_paused(Stage.VERIFY, True)
    with engine.begin() as connection:
        assert set(found(fleet.workers(connection)).values()) == {Level.WARNING}
        connection.execute(
            text("INSERT INTO worker_reports (worker_id, service, queue, error, pid) VALUES"
                 " ('a@h:1', 'workers', 'lookup', NULL, 1), ('b@h:2', 'workers', 'verification', 'no model', 2)")
        )  # fmt: skip
        assert found(fleet.workers(connection)) == {
            "workers.lookup": Level.OK, "workers.verification": Level.FAILURE,
        }  # fmt: skip
        connection.execute(text("INSERT INTO worker_drains (worker) VALUES ('a@h')"))
        assert found(fleet.workers(connection))["workers.lookup"] is Level.WARNING
        assert found(fleet.queues(connection)) == {"queues.verify": Level.WARNING}


def test_room_on_disk_is_told_and_a_folder_that_is_missing_is_no_failure(tmp_path: Path) -> None:
    (one,) = files.room({"state": tmp_path})
    assert one.check == "disk.state" and "GB free" in one.found
    assert found(files.room({"blobs": tmp_path / "none"})) == {"disk.blobs": Level.SKIPPED}


def test_everything_is_looked_at_and_what_is_away_is_one_finding(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    findings = examine(settings(database_url, redis_url, tmp_path))
    names = set(found(findings))
    assert names >= {
        "disk.state", "postgres.version", "postgres.fsync", "clock", "postgres.connections", "postgres.migrations",
        "workers.lookup", "queues", "releases", "redis", "redis.policy", "timeouts.queue", "timeouts.lease", "gateway",
    }  # fmt: skip
    assert worst(findings) is Level.FAILURE  # no gateway runs there
    away = examine(settings("postgresql://nobody@127.0.0.1:1/none", "redis://127.0.0.1:1/0", tmp_path))
    assert {name: level for name, level in found(away).items() if level is Level.FAILURE} == dict.fromkeys(
        ("postgres", "redis", "gateway"), Level.FAILURE
    )


def test_the_command_prints_json_and_fails_for_a_failure(
    database_url: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from byline.cli.app import build_app

    for name, value in {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "STATE_DIR": str(tmp_path),
                        "GRPC_ADDRESS": "127.0.0.1:1"}.items():  # fmt: skip
        monkeypatch.setenv(f"BYLINE_{name}", value)
    monkeypatch.setattr("byline.cli.app._configure_logging", lambda: None)
    result = CliRunner().invoke(build_app(), ["doctor", "--json", "--no-digests"])
    told = json.loads(result.output)
    assert result.exit_code == 1 and told["level"] == "failure"
    assert {"check", "level", "found", "advice"} == set(told["findings"][0])
    table = CliRunner().invoke(build_app(), ["admin", "doctor"])
    assert table.exit_code == 1 and "postgres.migrations" in table.output
