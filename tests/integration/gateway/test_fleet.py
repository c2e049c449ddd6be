"""The fleet's releases and requests for a refresh, over a real socket and by the commands an operator types."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from byline.cli.releases import app
from byline.client.releases import ReleaseClient
from byline.errors import BylineError, ModelNotFound, ReleaseNotEligible
from byline.releases.manifest import RefreshSection, RefreshTrigger
from byline.releases.requests import RefreshRequests

from .conftest import MODEL, Running, manifest

REPORT = text(
    "INSERT INTO worker_reports (worker_id, service, queue, pid) VALUES (:worker, 'workers', 'lookup', 1)"
)
SERVES = text(
    "INSERT INTO worker_releases (worker_id, model_id, release_id, loading, error)"
    " VALUES (:worker, :model, :release, :loading, :error)"
)


def report(served: Running, worker: str, release: str | None, loading: str | None = None, error: str | None = None,
           model: str = MODEL) -> None:  # fmt: skip
    with served.context.engine.begin() as connection:
        connection.execute(REPORT, {"worker": worker})
        connection.execute(SERVES, {"worker": worker, "model": model, "release": release, "loading": loading,
                                    "error": error})


@pytest.fixture
def client(served: Running) -> Iterator[ReleaseClient]:
    with ReleaseClient(served.address) as made:
        yield made


def test_the_fleet_shows_who_serves_what_and_who_could_not_load(
    client: ReleaseClient, served: Running, tmp_path: Path
) -> None:
    report(served, "w1", "r1")
    assert client.fleet(MODEL).swapped
    served.registry.register(manifest("r2", parent="r1"), tmp_path / "r2")
    served.registry.activate(MODEL, "r2")
    report(served, "w2", "r1", loading="r2")
    report(served, "w3", "r1", error="RELEASE_CORRUPT: head.safetensors was altered")
    report(served, "w4", "x1", model="another")
    fleet = client.fleet(MODEL)
    assert fleet.active is not None and fleet.active.release.endswith("/r2") and not fleet.swapped
    assert [(w.worker_id, w.release, w.loading, w.error[:15], w.current) for w in fleet.workers] == [
        ("w1", "r1", "", "", False), ("w2", "r1", "r2", "", False), ("w3", "r1", "", "RELEASE_CORRUPT", False),
    ]  # fmt: skip
    assert all(worker.since is not None and worker.last_seen is not None for worker in fleet.workers)
    assert fleet.rolled_back_from == ""
    served.registry.rollback(MODEL)
    assert client.fleet(MODEL).rolled_back_from == "r2"
    with pytest.raises(ModelNotFound):
        client.fleet("no-such-model")


def test_a_refresh_is_asked_for_once_and_its_outcome_is_read(client: ReleaseClient, served: Running) -> None:
    asked = client.refresh(MODEL, "cats look wrong")
    assert client.refresh(MODEL, "me too").name == asked.name and asked.end_time is None
    requests = RefreshRequests(served.context.engine)
    (waiting,) = requests.waiting(MODEL)
    assert (waiting.reason, waiting.principal) == ("cats look wrong", "local")
    requests.answer([waiting.request_id], release_id="r1")
    done = client.refresh_status(asked.name)
    assert done.end_time is not None and (done.release, done.error) == ("r1", "")
    assert client.refresh(MODEL).name != asked.name
    with pytest.raises(BylineError, match="no refresh"):
        client.refresh_status(f"models/{MODEL}/releaseRefreshes/{uuid.uuid4()}")
    with pytest.raises(BylineError, match="must be models"):
        client.refresh_status("models/x/releaseRefreshes/1")


def test_the_commands_print_what_scripts_can_read(
    served: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    for name, value in {"MODEL_ID": MODEL, "STATE_DIR": str(tmp_path), "GRPC_ADDRESS": served.address,
                        "DATABASE_URL": database_url}.items():  # fmt: skip
        monkeypatch.setenv(f"BYLINE_{name}", value)
    report(served, "w1", "r1")
    run = CliRunner().invoke
    shown = json.loads(run(app, ["status", "--json"]).stdout)
    assert shown["swapped"] and shown["workers"][0]["release"] == "r1"
    assert "w1" in run(app, ["status"]).stdout
    asked = json.loads(run(app, ["refresh", "--reason", "now", "--json"]).stdout)
    assert asked["reason"] == "now" and asked["end_time"] is None
    made = RefreshSection(
        triggers=(RefreshTrigger(trigger="drift", detail="overlap fell"),),
        snapshot_at=datetime(2026, 1, 2, tzinfo=UTC),
        start="warm", validation_map={"warm": 0.5, "fresh": 0.4}, held_out_split="test", held_out_queries=12,
        held_out_digest="d",
    )  # fmt: skip
    for number in (2, 3):
        described = manifest(f"r{number}").model_copy(update={"refresh": made})
        served.registry.register(described, tmp_path / f"r{number}")
        (tmp_path / f"r{number}").mkdir()
    shown = run(app, ["show", "r3"]).stdout
    assert "drift: overlap fell" in shown and "head: warm" in shown and "12 test queries" in shown
    options = ["gc", "--keep", "0", "--days", "0", "--json"]
    dry = json.loads(run(app, [*options, "--dry-run"]).stdout)
    assert dry["remove"] == ["r3", "r2"] and set(dry["keep"]) == {"r1"}
    assert all((tmp_path / name).is_dir() for name in ("r2", "r3"))
    removed = run(app, options).stdout
    assert json.loads(removed[removed.index("{\n") :])["remove"] == ["r3", "r2"]  # a log line may stand before it
    assert not any((tmp_path / name).exists() for name in ("r2", "r3"))
    assert json.loads(run(app, options).stdout)["remove"] == []
    listed = {one["name"][-2:]: one for one in json.loads(run(app, ["list", "--json"]).stdout)["releases"]}
    assert listed["r2"]["collect_time"] and not listed["r1"]["collect_time"]
    with pytest.raises(ReleaseNotEligible, match="files of release r2 were removed"):
        served.registry.activate(MODEL, "r2")
