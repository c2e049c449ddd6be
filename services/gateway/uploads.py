"""Uploads that broke and go on: what arrived is kept under the digest it claims, for a day.

Why it exists: eight megabytes over a bad line must not begin again each time. The parts lie beside the blobs, which
all gateways share, in a folder of each project; nothing of them can be asked about before digest and size fit.
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from pathlib import Path

#: Under the blob folder; a dot keeps it apart from the blobs' own folders.
FOLDER = ".uploads"
KEPT_S = 24 * 3600.0
#: Of one project; more are not kept, so that broken uploads cannot fill the disk.
MOST = 64
_DIGEST = re.compile(r"[0-9a-f]{64}")


class PartialUploads:
    """Files ``<project>/<sha256>.part``. Synchronous and quick: no file is larger than an image may be."""

    def __init__(self, blob_dir: Path) -> None:
        self._root = blob_dir / FOLDER

    def committed(self, project_id: str, sha256: str) -> int:
        """Bytes kept of an upload; 0 if none are."""
        with suppress(FileNotFoundError):
            return self._path(project_id, sha256).stat().st_size
        return 0

    def prefix(self, project_id: str, sha256: str, size: int) -> bytes | None:
        """The first ``size`` bytes kept; None if there are not so many."""
        try:
            with self._path(project_id, sha256).open("rb") as file:
                data = file.read(size)
        except FileNotFoundError:
            return None
        return data if len(data) == size else None

    def keep(self, project_id: str, sha256: str, data: bytes) -> None:
        """Keep what arrived, instead of what was kept before if that was less."""
        path = self._path(project_id, sha256)
        if len(data) <= self.committed(project_id, sha256):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() and sum(1 for _ in path.parent.iterdir()) >= MOST:
            return
        beside = path.with_suffix(".tmp")
        beside.write_bytes(data)
        beside.replace(path)

    def forget(self, project_id: str, sha256: str) -> None:
        """The upload is complete, or what was kept was wrong."""
        self._path(project_id, sha256).unlink(missing_ok=True)

    def sweep(self, now: float | None = None) -> int:
        """Remove what was kept for longer than a day; how many. ``now`` in seconds since 1970."""
        before = (time.time() if now is None else now) - KEPT_S
        removed = 0
        for path in self._root.glob("*/*"):
            with suppress(FileNotFoundError):  # another gateway sweeps too
                if path.stat().st_mtime < before:
                    path.unlink()
                    removed += 1
        return removed

    def _path(self, project_id: str, sha256: str) -> Path:
        if not _DIGEST.fullmatch(sha256) or "/" in project_id or project_id.startswith("."):
            raise ValueError("no name of an upload")  # names.py let it through: a bug
        return self._root / project_id / f"{sha256}.part"
