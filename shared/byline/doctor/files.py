"""What the doctor looks at on disk: room, and whether releases are what their manifests say.

Why it exists: a full disk stops the trainer, and a damaged file stops the workers that start next, hours later.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from sqlalchemy import Connection, text

from byline.doctor.finding import Finding, Level, ok
from byline.errors import ReleaseCorrupt
from byline.releases.manifest import ReleaseManifest, verify_files

WARNS_BELOW = 0.15
FAILS_BELOW = 0.05

_ACTIVE = text("""
SELECT a.model_id, r.id, r.directory, r.manifest, r.id = a.release_id AS active
FROM active_releases a JOIN releases r ON r.id IN (a.release_id, a.previous_release_id) ORDER BY 1, 5 DESC
""")


def room(folders: Mapping[str, Path]) -> list[Finding]:
    """Is there room, and may we write?"""
    return [_room(name, folder) for name, folder in folders.items()]


def _room(name: str, folder: Path) -> Finding:
    check = f"disk.{name}"
    if not folder.is_dir():
        return Finding(check, Level.SKIPPED, f"{folder} does not exist yet")
    if not os.access(folder, os.W_OK):
        return Finding(check, Level.FAILURE, f"{folder} cannot be written", "give it to the user that runs Byline")
    usage = shutil.disk_usage(folder)
    share = usage.free / usage.total
    found = f"{usage.free / 1e9:.1f} GB free of {usage.total / 1e9:.1f} at {folder}"
    if share < WARNS_BELOW:
        advice = "remove retired releases (`byline releases gc`) and old query images, or give it a larger disk"
        return Finding(check, Level.FAILURE if share < FAILS_BELOW else Level.WARNING, found, advice)
    return ok(check, found)


def releases(connection: Connection) -> list[Finding]:
    """Are the active and the previous release of every model whole? Reads every byte of them."""
    rows: Sequence[object] = connection.execute(_ACTIVE).all()
    if not rows:
        return [Finding("releases", Level.SKIPPED, "no release is active yet")]
    return [_release(*row) for row in rows]  # type: ignore[misc]


def _release(model_id: str, release_id: str, directory: str, manifest: object, active: bool) -> Finding:
    check = f"releases.{model_id}.{'active' if active else 'previous'}"
    advice = (
        "workers that hold it answer on; new ones cannot start: copy it back from a backup, or activate another"
        if active
        else "rolling back to it would fail: copy it back from a backup"
    )
    try:
        verify_files(Path(directory), ReleaseManifest.from_json(manifest))
    except (ReleaseCorrupt, OSError) as error:
        level = Level.FAILURE if active else Level.WARNING
        return Finding(check, level, f"{release_id}: {getattr(error, 'message', error)}", advice)
    return ok(check, f"{release_id}: every file has its digest")
