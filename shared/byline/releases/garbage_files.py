"""Folders under the release root that no release lives in: being built, being removed, or left by the dead.

Why it exists: a builder that is killed leaves a hidden folder nobody will ever finish. Whether its builder lives is
asked of the kernel, by a lock on the folder, and not guessed from its age alone.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from byline.failpoints import failpoint

#: Beginnings of hidden names: a release that is being written, and one whose files are being removed.
BUILDING, REMOVING = ".building-", ".removing-"
#: A folder younger than this (seconds) is left alone: its builder may not have locked it yet, or be on a machine
#: whose locks do not reach this one.
YOUNG_S = 3600.0


def hold(folder: Path) -> int:
    """Mark a folder as in use until the returned descriptor is closed, or its process ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with suppress(OSError):  # a file system without locks: its age protects it
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def remove_release(directory: Path) -> int:
    """Remove a release's directory; returns the bytes freed. Hidden first, so that nobody meets half of it."""
    hidden = directory.with_name(f"{REMOVING}{directory.name}")
    with suppress(FileNotFoundError):
        directory.rename(hidden)
    failpoint("releases.gc_after_hide")
    return remove_tree(hidden)


def remove_tree(folder: Path) -> int:
    """Remove a folder that may be read-only or partly gone; returns the bytes freed."""
    if not folder.exists():
        return 0
    folder.chmod(0o755)
    freed = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder)
    return freed


def abandoned(root: Path, young_s: float = YOUNG_S) -> list[Path]:
    """Hidden folders whose process ended: being removed, or being built by nobody."""
    found = []
    for folder in sorted(root.glob(f"{BUILDING}*")):
        if time.time() - folder.stat().st_mtime >= young_s and not _held(folder):
            found.append(folder)
    return [*found, *sorted(root.glob(f"{REMOVING}*"))]


def _held(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return True  # gone meanwhile
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
