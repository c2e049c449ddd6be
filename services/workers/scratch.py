"""Where a long job keeps its finished chunks, so that another attempt on this machine goes on behind them.

Why it exists: a ranking of many queries takes minutes, and a worker may be stopped, killed or lose its lease at any
of them. What was computed is no effect of the job (nobody sees it before the job completes), so it needs no fence:
it is a cache, named after the job and after everything it was computed from.
"""

from __future__ import annotations

import hashlib
import shutil
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

from byline.telemetry import get_logger

log = get_logger(__name__)

#: Leftovers of jobs that were cancelled or ended elsewhere are removed when nobody touched them for so long.
KEPT_S = 2 * 24 * 3600.0


class Scratch:
    """Folders under ``root``, one for each job in progress."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def folder(self, job_id: uuid.UUID, contents: Iterable[str]) -> Path:
        """The folder of a job for work on exactly these ``contents``; what the job kept of other work is removed.

        An item withdrawn between two attempts changes the work: then it starts anew.
        """
        digest = hashlib.sha256("\0".join(contents).encode()).hexdigest()[:16]
        wanted = self._root / f"{job_id}-{digest}"
        for other in self._root.glob(f"{job_id}-*"):
            if other != wanted:
                shutil.rmtree(other, ignore_errors=True)
        wanted.mkdir(parents=True, exist_ok=True)
        return wanted

    def clear(self, job_id: uuid.UUID) -> None:
        """Forget a job that is done. Never raises: what stays is removed by ``sweep`` one day."""
        for folder in self._root.glob(f"{job_id}-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what nobody has touched for ``KEPT_S`` seconds. Never raises."""
        for folder in self._root.glob("*-*"):
            try:
                touched = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            except OSError:  # a sibling removes it, too
                continue
            if time.time() - touched > KEPT_S:
                log.info("scratch_swept", folder=folder.name)
                shutil.rmtree(folder, ignore_errors=True)
