"""``byline backup``: make a backup, look whether one is whole, restore it.

Why it exists: a backup whose way back was never walked is none, so both directions are one command each and are tested
together (``tests/e2e/test_operations.py``).
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from byline import backup
from byline.backup import BackupManifest
from byline.cli.operator import AsJson, line, say
from byline.config import Settings, load_settings

app = typer.Typer(help="Make, verify and restore backups of database, images and releases.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="Folder of the backup.")]


@app.command("create")
def create(folder: Folder, as_json: AsJson = False) -> None:
    """Dump the database, then copy images and releases. The system goes on meanwhile. A folder may be used again: only
    what is new or damaged there is copied."""
    settings = load_settings()
    _say("made", backup.create(settings.database_url, _places(settings), folder, datetime.now(UTC)), as_json)


@app.command("verify")
def verify(folder: Folder, as_json: AsJson = False) -> None:
    """Read a backup whole and compare digests."""
    _say("whole", backup.verify(folder), as_json)


@app.command("restore")
def restore(
    folder: Folder,
    replace: Annotated[bool, typer.Option("--replace", help="Drop what the database holds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put a backup back into the configured database and folders. Stop the services first, start them after."""
    settings = load_settings()
    manifest = backup.restore(folder, settings.database_url, _places(settings), replace=replace)
    _say("restored", manifest, as_json)


def _places(settings: Settings) -> dict[str, Path]:
    return {"blobs": settings.blob_dir, "releases": settings.release_dir}


def _say(done: str, manifest: BackupManifest, as_json: bool) -> None:
    if as_json:
        say(asdict(manifest))
        return
    line(f"{done}: {manifest.created_at}, schema {manifest.migration}, {manifest.files} files, "
         f"{manifest.bytes / 1e6:.1f} MB beside the database")  # fmt: skip
