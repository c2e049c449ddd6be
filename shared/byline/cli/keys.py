"""``byline keys``: make, list and revoke API keys.

Why it exists: the first key cannot be made over an API that asks for one, so this works on the database, on a machine
that may reach it. What it does stands in the audit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from byline.config import load_settings
from byline.db import make_engine
from byline.errors import InvalidRequest, SettingsInvalid
from byline.releases.manifest import verify_files
from byline.releases.registry import ReleaseRegistry
from byline.security.keys import KeyRecord, KeyStore
from byline.security.scopes import ALL_SCOPES, PROJECT_SCOPES
from byline.security.signing import SIGNATURE, Keyring, sign_manifest

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Make, list and revoke API keys.")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Project = Annotated[str | None, typer.Option(help="The project it is for (BYLINE_PROJECT_ID).")]


@app.command("create")
def create(
    name: Annotated[str, typer.Option(help="What it is for: shown in lists, so that one dares to revoke it.")],
    project: Project = None,
    operator: Annotated[bool, typer.Option("--operator", help="Not of one project: may act in all of them.")] = False,
    scope: Annotated[
        list[str] | None, typer.Option(help="May be given several times. Default: all that it can have.")
    ] = None,
    days: Annotated[float | None, typer.Option(help="Expires after so many days.")] = None,
    rate: Annotated[float | None, typer.Option(help="Calls a second (BYLINE_RATE_PER_SECOND).")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, this once: only its digest is kept."""
    if days is not None and days <= 0:
        raise InvalidRequest("days", "must be positive", value=days)
    if operator and project is not None:
        raise InvalidRequest("project", "an operator's key is of no project: leave out --project or --operator")
    settings = load_settings()
    scopes = scope or sorted(ALL_SCOPES if operator else PROJECT_SCOPES)
    with _store() as store:
        issued = store.create(
            project_id=None if operator else project or settings.project_id, name=name, scopes=scopes, days=days,
            rate_per_second=rate,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps({**_plain(issued.record), "key": issued.token}, indent=1))
    else:
        typer.echo(issued.token)
        Console(stderr=True).print(f"key {issued.record.id}; it is not shown again", highlight=False)


@app.command("list")
def list_keys(project: Project = None, as_json: AsJson = False) -> None:
    """Show all keys (or those of one project), without their secrets."""
    with _store() as store:
        records = store.list(project)
    if as_json:
        typer.echo(json.dumps([_plain(record) for record in records], indent=1))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("id", "name", "project", "scopes", "state", "created", "last used"):
        table.add_column(column)
    for record in records:
        table.add_row(
            record.id, record.name, record.project_id or "(operator)", " ".join(record.scopes), _state(record),
            _day(record.created_at), _day(record.last_used_at),
        )  # fmt: skip
    Console().print(table)


@app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `byline keys list` shows it.")],
    as_json: AsJson = False,
) -> None:
    """End a key for good. Gateways that run hear of it at once."""
    with _store() as store:
        record = store.revoke(key_id)
    if as_json:
        typer.echo(json.dumps(_plain(record), indent=1))
        return
    typer.echo(f"revoked {record.id} ({record.name})")


@app.command("sign-release")
def sign_release(
    release: Annotated[str, typer.Argument(help="Id of the release.")], as_json: AsJson = False
) -> None:
    """Sign a release from before BYLINE_SIGNING_KEY was set, or with the new key of a rotation.

    Its files are compared with the manifest that the registry holds; where they came from is yours to know.
    """
    settings = load_settings()
    keyring = Keyring.parse(settings.signing_key)
    if not keyring:
        raise SettingsInvalid("set BYLINE_SIGNING_KEY to the key that is to sign", variable="BYLINE_SIGNING_KEY")
    engine = make_engine(settings.database_url, pool_size=1, application="byline-keys")
    try:
        record = ReleaseRegistry(engine).get(release)
    finally:
        engine.dispose()
    verify_files(record.directory, record.manifest)
    mode = record.directory.stat().st_mode
    record.directory.chmod(mode | 0o200)
    (record.directory / SIGNATURE).unlink(missing_ok=True)
    sign_manifest(record.directory, record.manifest.digest, keyring)
    record.directory.chmod(mode)
    if as_json:
        typer.echo(json.dumps({"release": release, "key": keyring.key_ids[0]}, indent=1))
        return
    typer.echo(f"signed {release} with key {keyring.key_ids[0]}")


@contextmanager
def _store() -> Iterator[KeyStore]:
    engine = make_engine(load_settings().database_url, pool_size=1, application="byline-keys")
    try:
        yield KeyStore(engine)
    finally:
        engine.dispose()


def _plain(record: KeyRecord) -> dict[str, Any]:
    values = asdict(record) | {"state": _state(record)}
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in values.items()}


def _state(record: KeyRecord) -> str:
    if record.revoked_at is not None:
        return "revoked"
    if record.expires_at is not None and record.expires_at <= datetime.now(record.expires_at.tzinfo):
        return "expired"
    return "valid"


def _day(moment: datetime | None) -> str:
    return "" if moment is None else f"{moment:%Y-%m-%d %H:%M}"
