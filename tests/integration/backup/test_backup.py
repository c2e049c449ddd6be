"""A backup is made, the installation is wiped, and what comes back is what was there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Engine, inspect, text
from typer.testing import CliRunner

from byline import backup
from byline.catalog.blobs import BlobStore
from byline.db import make_engine
from byline.errors import BackupFailed, ServerNotStarted
from byline.jobs import NewJob, Stage
from byline.jobs.store import JobStore
from byline.releases.manifest import REQUIRED_FILES, LabelSet, ReleaseManifest, file_entry

NOW = datetime(2026, 11, 24, tzinfo=UTC)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = make_engine(database_url, pool_size=2)
    yield engine
    engine.dispose()


@pytest.fixture
def places(engine: Engine, tmp_path: Path) -> dict[str, Path]:
    """Images and a release on disk, and rows that name them."""
    places = {"blobs": tmp_path / "blobs", "releases": tmp_path / "releases"}
    blobs = BlobStore(places["blobs"])
    store = JobStore(engine, {})
    for name in ("waits", "is answered"):
        sha256 = blobs.put(name.encode())
        new = NewJob(project_id="p", request_id=name, model_id="m", prompt=name, image_sha256=sha256)
        job, _ = store.create(new)
    claim = store.claim(job.id, Stage.LOOKUP, "w", 30.0, "r1")
    assert claim is not None
    store.complete(claim, {"influences": [1, 2]})
    folder = places["releases"] / "r1"
    folder.mkdir(parents=True)
    for name in REQUIRED_FILES:
        (folder / name).write_bytes(b"release " + name.encode())
    manifest = ReleaseManifest(
        release_id="r1", model_id="m", model_revision="v", corpus_id="c", parent=None, created_at=NOW,
        feature_spec="minilm", preprocessing_hash="p", feature_dim=8, embedding_dim=4, items=1, index_factory="Flat",
        teacher_id="abu_plus", labels=LabelSet(queries=3, digest="d"), metrics={"map": 0.5},
        files={name: file_entry(folder / name) for name in REQUIRED_FILES},
    )  # fmt: skip
    manifest.write(folder)
    (places["releases"] / ".tmp-half").mkdir()  # what a trainer is just writing is not for a backup
    (places["releases"] / ".tmp-half" / "head.safetensors").write_bytes(b"half")
    with engine.begin() as connection:
        connection.execute(
            text("INSERT INTO releases (id, model_id, state, directory, manifest)"
                 " VALUES ('r1', 'm', 'VALIDATED', :directory, '{}')"), {"directory": str(folder)}
        )  # fmt: skip
    return places


def contents(engine: Engine) -> dict[str, list[str]]:
    """Every row of every table, as text."""
    with engine.connect() as connection:
        return {
            table: sorted(connection.execute(text(f'SELECT CAST(t AS text) FROM "{table}" t')).scalars())  # noqa: S608
            for table in inspect(engine).get_table_names()
        }


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_after_dump_wipe_and_restore_every_row_and_every_file_is_back(
    engine: Engine, database_url: str, places: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / "backup"
    made = backup.create(database_url, places, target, NOW)
    rows, files = contents(engine), {name: tree(folder) for name, folder in places.items()}
    assert made.files == 2 + len(REQUIRED_FILES) + 1 and len(rows["jobs"]) == 2 and len(rows["job_results"]) == 1

    for folder in places.values():
        shutil.rmtree(folder)
    with engine.begin() as connection:
        connection.execute(text("TRUNCATE jobs CASCADE"))
    with pytest.raises(BackupFailed, match="--replace"):
        backup.restore(target, database_url, places)
    engine.dispose()
    assert backup.restore(target, database_url, places, replace=True) == made

    assert contents(engine) == rows
    files["releases"].pop(".tmp-half/head.safetensors")
    assert {name: tree(folder) for name, folder in places.items()} == files
    store = JobStore(engine, {})  # and it works: triggers, sequences and constraints came back, too
    job, created = store.create(NewJob(project_id="p", request_id="waits", model_id="m", prompt="waits",
                                       image_sha256=BlobStore(places["blobs"]).put(b"waits")))  # fmt: skip
    assert not created and store.claim(job.id, Stage.LOOKUP, "w", 30.0) is not None
    assert [event.to_state for event in store.events(job.id)] == ["QUEUED", "RUNNING"]


def test_releases_are_found_where_they_lie_now(
    engine: Engine, database_url: str, places: dict[str, Path], tmp_path: Path
) -> None:
    backup.create(database_url, places, tmp_path / "backup", NOW)
    elsewhere = {"blobs": tmp_path / "new" / "blobs", "releases": tmp_path / "new" / "releases"}
    engine.dispose()
    backup.restore(tmp_path / "backup", database_url, elsewhere, replace=True)
    with engine.connect() as connection:
        (directory,) = connection.execute(text("SELECT directory FROM releases")).one()
    assert Path(directory) == elsewhere["releases"] / "r1" and (Path(directory) / "manifest.json").is_file()


def test_a_second_backup_copies_only_what_is_new(
    database_url: str, places: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / "backup"
    backup.create(database_url, places, target, NOW)
    before = {path: path.stat().st_ino for path in (target / "blobs").rglob("*") if path.is_file()}
    BlobStore(places["blobs"]).put(b"a new one")
    assert backup.create(database_url, places, target, NOW).files == len(before) + 1 + len(REQUIRED_FILES) + 1
    assert {path: path.stat().st_ino for path in before} == before


def flipped(path: Path) -> bytes:
    """Turn one bit of a file round, as a bad disk does, and return what it was: its size stays."""
    before = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(bytes([before[0] ^ 1]) + before[1:])
    return before


def one_of_each(root: Path) -> list[Path]:
    """An image, a file of a release, and the release's manifest."""
    blob = next(path for path in sorted((root / "blobs").rglob("*")) if path.is_file())
    return [blob, *(root / "releases" / "r1" / name for name in (REQUIRED_FILES[0], "manifest.json"))]


def test_a_file_that_rotted_in_the_installation_is_replaced_by_a_restore(
    engine: Engine, database_url: str, places: dict[str, Path], tmp_path: Path
) -> None:
    backup.create(database_url, places, tmp_path / "backup", NOW)
    good = {path: flipped(path) for path in one_of_each(tmp_path)}
    engine.dispose()
    backup.restore(tmp_path / "backup", database_url, places, replace=True)
    assert {path: path.read_bytes() for path in good} == good


def test_a_copy_that_rotted_in_the_backup_is_replaced_by_the_next_one(
    database_url: str, places: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / "backup"
    backup.create(database_url, places, target, NOW)
    good = {path: flipped(path) for path in one_of_each(target)}
    with pytest.raises(BackupFailed):
        backup.verify(target)
    made = backup.create(database_url, places, target, NOW)
    assert {path: path.read_bytes() for path in good} == good and backup.verify(target) == made


@pytest.mark.parametrize("which", [0, 1], ids=["image", "release"])
def test_a_file_that_rotted_in_the_installation_never_takes_the_place_of_a_good_copy(
    database_url: str, places: dict[str, Path], tmp_path: Path, which: int
) -> None:
    target = tmp_path / "backup"
    backup.create(database_url, places, target, NOW)
    source, copy = one_of_each(tmp_path)[which], one_of_each(target)[which]
    good = flipped(source)
    backup.create(database_url, places, target, NOW)
    assert copy.read_bytes() == good and backup.verify(target)
    with pytest.raises(BackupFailed, match=source.name):  # nowhere a good one: said now, not on the day of the restore
        backup.create(database_url, places, tmp_path / "another", NOW)
    flipped(copy)
    with pytest.raises(BackupFailed, match=source.name):
        backup.create(database_url, places, target, NOW)


def test_without_a_private_server_the_systems_own_programs_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Path:
        raise ServerNotStarted("no Postgres here")

    monkeypatch.setattr("byline.embedded.postgres.installed_binaries", none)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackupFailed, match="pg_dump is not installed"):
        backup._program("pg_dump")
    (tmp_path / "pg_dump").write_text("#!/bin/sh\n")
    (tmp_path / "pg_dump").chmod(0o755)
    assert backup._program("pg_dump") == str(tmp_path / "pg_dump")


@pytest.mark.parametrize("damage", ["dump", "image", "release", "missing", "unfinished"])
def test_a_damaged_backup_is_refused_before_anything_is_touched(
    engine: Engine, database_url: str, places: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    target = tmp_path / "backup"
    backup.create(database_url, places, target, NOW)
    blob = next(path for path in (target / "blobs").rglob("*") if path.is_file())
    if damage == "dump":
        (target / backup.DUMP).write_bytes((target / backup.DUMP).read_bytes()[:-10])
    elif damage == "image":
        blob.write_bytes(b"other bytes")
    elif damage == "release":
        (target / "releases" / "r1" / REQUIRED_FILES[0]).write_bytes(b"other bytes")
    elif damage == "missing":
        blob.unlink()
    else:
        (target / backup.MANIFEST).unlink()
    before = contents(engine)
    with pytest.raises(BackupFailed):
        backup.restore(target, database_url, places, replace=True)
    assert contents(engine) == before


def test_the_commands_of_the_page_do_it(
    engine: Engine, database_url: str, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from byline.cli.app import build_app

    monkeypatch.setenv("BYLINE_DATABASE_URL", database_url)
    monkeypatch.setenv("BYLINE_STATE_DIR", str(tmp_path))
    monkeypatch.setattr("byline.cli.app._configure_logging", lambda: None)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(build_app(), ["backup", *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    folder = str(tmp_path / "backup")
    assert json.loads(run("create", folder, "--json"))["files"] > 2
    assert "whole" in run("verify", folder)
    rows = contents(engine)
    engine.dispose()
    assert "restored" in run("restore", folder, "--replace")
    assert contents(engine) == rows
