"""A backup of everything that cannot be made again, and the way back from it.

Why it exists: Postgres is the truth, and its rows name files (images by content, releases by id). Files
are copied after the dump, so that every row of the dump finds its file; both kinds never change once written, so a
second backup into the same folder copies only what is new, or what no longer has the content that was written. Redis
holds nothing worth keeping. The generator's directory and the signing key are yours: keep them as you keep your other
secrets and inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy import Engine, text
from sqlalchemy.engine import URL

from byline.db.session import database_url, make_engine, transaction
from byline.errors import BackupFailed, ReleaseCorrupt, ServerNotStarted
from byline.releases.manifest import MANIFEST as RELEASE_MANIFEST
from byline.releases.manifest import ReleaseManifest, verify_files

MANIFEST = "backup.json"
DUMP = "database.dump"
_DIGEST = re.compile(r"[0-9a-f]{64}")
#: Folders of a backup, and the setting that says where each lies in an installation.
FOLDERS = ("blobs", "releases")


@dataclass(frozen=True)
class BackupManifest:
    """What a backup holds. ``release_dir`` is where releases lay; rows name them by path."""

    created_at: str
    migration: str
    dump_sha256: str
    release_dir: str
    files: int
    bytes: int


def create(url: str, sources: Mapping[str, Path], target: Path, now: datetime) -> BackupManifest:
    """Dump the database at ``url`` and copy ``sources`` ("blobs", "releases") into ``target``.

    An earlier backup there is replaced only once everything of the new one is there. Raises ``BackupFailed``.
    """
    target.mkdir(parents=True, exist_ok=True)
    engine = make_engine(url, pool_size=1, application="byline-backup")
    try:
        with transaction(engine) as connection:
            migration = str(connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one())
    finally:
        engine.dispose()
    fresh = target / f".{DUMP}"
    _run("pg_dump", url, ["--format=custom", "--no-owner", "--no-privileges", f"--file={fresh}"])
    for name in FOLDERS:
        for source, relative in _files(sources[name]):
            _copy(source, target / name / relative)
    (target / MANIFEST).unlink(missing_ok=True)  # a folder without one is no backup
    os.replace(fresh, target / DUMP)
    copied = [path for name in FOLDERS for path, _ in _files(target / name)]
    manifest = BackupManifest(
        created_at=now.isoformat(), migration=migration, dump_sha256=_sha256(target / DUMP),
        release_dir=str(sources["releases"].absolute()), files=len(copied),
        bytes=sum(path.stat().st_size for path in copied),
    )  # fmt: skip
    (target / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n")
    return manifest


def verify(folder: Path) -> BackupManifest:
    """The manifest of a whole backup. Raises ``BackupFailed`` for one that is damaged, or is none."""
    try:
        manifest = BackupManifest(**json.loads((folder / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise BackupFailed(f"{folder} holds no finished backup ({type(error).__name__})", folder=str(folder)) from error
    if not (folder / DUMP).is_file() or _sha256(folder / DUMP) != manifest.dump_sha256:
        raise BackupFailed(f"{folder / DUMP} is not the dump that was written; take an older backup")
    found = [path for name in FOLDERS for path, _ in _files(folder / name)]
    if len(found) < manifest.files:
        raise BackupFailed(f"{manifest.files - len(found)} files are missing from {folder}; take an older backup")
    for path, _ in _files(folder / "blobs"):
        if _DIGEST.fullmatch(path.name) and _sha256(path) != path.name:
            raise BackupFailed(f"{path} does not have the content its name says", file=str(path))
    for path, _ in _files(folder / "releases"):
        if path.name == RELEASE_MANIFEST:
            try:
                verify_files(path.parent, ReleaseManifest.read(path.parent))
            except ReleaseCorrupt as error:
                raise BackupFailed(f"{path.parent}: {error.message}", release=path.parent.name) from error
    return manifest


def restore(folder: Path, url: str, targets: Mapping[str, Path], *, replace: bool = False) -> BackupManifest:
    """Put a backup back: files first, so that no row is seen before its file. Verifies it before anything is touched.

    ``replace`` drops what the database holds; without it a database with tables is refused. Raises ``BackupFailed``.
    """
    manifest = verify(folder)
    engine = make_engine(url, pool_size=1, application="byline-restore")
    try:
        with transaction(engine) as connection:
            tables = connection.execute(text("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")).scalar_one()
        if tables and not replace:
            raise BackupFailed("the database has tables: say --replace to drop them, or restore into an empty one")
        for name in FOLDERS:
            for source, relative in _files(folder / name):
                _copy(source, targets[name] / relative)
        if tables:
            with transaction(engine) as connection:
                connection.execute(text("DROP SCHEMA public CASCADE"))
                connection.execute(text("CREATE SCHEMA public"))
        arguments = ["--no-owner", "--no-privileges", "--exit-on-error", "--single-transaction"]
        _run("pg_restore", url, [*arguments, str(folder / DUMP)])
        _point_releases(engine, manifest.release_dir, str(targets["releases"].absolute()))
    finally:
        engine.dispose()
    return manifest


def _point_releases(engine: Engine, before: str, now: str) -> None:
    """Releases lie elsewhere in this installation."""
    statement = text(
        "UPDATE releases SET directory = :now || substr(directory, length(:before) + 1)"
        " WHERE starts_with(directory, :before || '/') AND :now <> :before"
    )
    with transaction(engine) as connection:
        connection.execute(statement, {"before": before, "now": now})


def _files(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Every finished file below ``folder``, with its path in it. What begins with a dot is being written."""
    if not folder.is_dir():
        return
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            yield path, relative


def _copy(source: Path, target: Path) -> None:
    """Copy unless that very content is there already; never half a file, nor a damaged one, under its name."""
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        written = _digest(source)
        if target.is_file() and _sha256(target) == (written or _sha256(source)):
            return
        shutil.copyfile(source, part)
        if written is not None and _sha256(part) != written:
            raise BackupFailed(
                f"{source} does not have the content that was written: put a good copy in its place (an older backup"
                " may have one), then repeat this", file=str(source),
            )  # fmt: skip
        os.replace(part, target)
    except FileNotFoundError:
        pass  # deleted since it was listed: no row of a later moment names it
    except OSError as error:
        raise BackupFailed(f"cannot copy {source} to {target}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def _digest(path: Path) -> str | None:
    """The sha256 that a file was written with: an image's name, or what the manifest beside a release's file says."""
    if _DIGEST.fullmatch(path.name):
        return path.name
    if path.name == RELEASE_MANIFEST or not (path.parent / RELEASE_MANIFEST).is_file():
        return None
    try:
        entry = ReleaseManifest.read(path.parent).files.get(path.name)
    except ReleaseCorrupt as error:
        raise BackupFailed(f"{path.parent}: {error.message}", release=path.parent.name) from error
    return None if entry is None else entry.sha256


def _run(program: str, url: str, arguments: list[str]) -> None:
    """A program of Postgres on the database at ``url``; the password is not on the command line."""
    where: URL = database_url(url)
    environment = {
        **os.environ, "PGHOST": where.host or "", "PGPORT": str(where.port or 5432), "PGUSER": where.username or "",
        "PGPASSWORD": str(where.password or ""), "PGDATABASE": where.database or "",
    }  # fmt: skip
    command = [_program(program), "--no-password", *arguments]
    if program == "pg_restore":
        command.insert(1, f"--dbname={where.database}")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BackupFailed(f"{program} failed: {last}", program=program)


def _program(name: str) -> str:
    """The one of the private server's package, which is as new as that server, else the one on PATH."""
    from byline.embedded.postgres import installed_binaries

    try:
        own = installed_binaries() / name
    except ServerNotStarted:  # no server is installed here; its programs may be
        own = Path()
    found = str(own) if own.is_file() else shutil.which(name)
    if found is None:
        raise BackupFailed(f"{name} is not installed; it must be as new as the server: install byline[embedded], or"
                           " your system's client programs (Debian: postgresql-client)")  # fmt: skip
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
