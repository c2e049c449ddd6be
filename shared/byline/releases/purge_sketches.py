"""Withdrawn items out of the sketch sets that were made on this machine, whatever moment the process is killed at.

Why it exists: a folder cannot be exchanged for another in one step. Between the two steps the set has another name,
and behind them the old one still holds the items; so every name says what is to become of it, and the next purge does
that first.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from byline.errors import BylineError
from byline.failpoints import failpoint
from byline.telemetry import get_logger

log = get_logger(__name__)

Ids = NDArray[np.int64]
#: Ends of hidden names: a set that is being written, one that makes place for it, and one that is to go.
_CUT, _OLD, _GONE = "-cut", "-old", "-gone"


def sketch_sets(cache_dir: Path) -> list[Path]:
    """The sketch sets that were made on this machine."""
    return sorted(path.parent for path in cache_dir.glob("teachers-*/sketches*/manifest.json"))


def settle_cuts(cache_dir: Path) -> None:
    """End what a killed purge began: a set is back under its name, and nothing hidden is left beside it."""
    for old in cache_dir.glob(f"teachers-*/.sketches*{_OLD}"):
        folder = old.with_name(old.name.removeprefix(".").removesuffix(_OLD))
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)
    for end in (_CUT, _GONE):
        for left in cache_dir.glob(f"teachers-*/.sketches*{end}"):
            shutil.rmtree(left)


def cut_sketches(folder: Path, gone: Ids) -> int:
    """Write a set again without these items; how many it lost. One that cannot be read is removed: it is a cache."""
    from byline.teachers.sketch_set import SketchSet

    try:
        held = SketchSet.load(folder, folder.parent.name.removeprefix("teachers-"))
    except (BylineError, OSError, ValueError, KeyError) as error:
        log.warning("sketches_unreadable_removed", folder=folder.name, error=str(error))
        _remove(folder)
        return 0
    keep = np.flatnonzero(~np.isin(held.item_ids, gone))
    lost = len(held.item_ids) - len(keep)
    if not lost:
        return 0
    if not len(keep):
        _remove(folder)
        return lost
    cut, old = _beside(folder, _CUT), _beside(folder, _OLD)
    tokens = None if held.tokens is None else held.tokens.take(keep)
    SketchSet(held.basis, held.item_ids[keep], held.sketches[keep], held.fidelity, held.teacher_id, tokens).save(cut)
    failpoint("corpus.purge_sketches_saved")
    folder.rename(old)
    failpoint("corpus.purge_sketches_hidden")
    cut.rename(folder)
    failpoint("corpus.purge_sketches_shown")
    shutil.rmtree(old)
    return lost


def _remove(folder: Path) -> None:
    hidden = _beside(folder, _GONE)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _beside(folder: Path, end: str) -> Path:
    return folder.with_name(f".{folder.name}{end}")
