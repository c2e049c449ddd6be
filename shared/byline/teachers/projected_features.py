"""Projected item gradients on disk: computed once per model and noise, extended when the corpus grows.

Why it exists: TRAK and D-TRAK pay one gradient pass over the corpus and then score any query in milliseconds, so the
pass must survive a kill, be found again, and never be taken for another corpus's or model's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from byline.errors import TeacherNotUsable
from byline.teachers.files import MANIFEST
from byline.teachers.ranking import Check, Progress, TeacherItem, ignore_progress, never_cancelled
from byline.teachers.row_store import RowStore, digest_of

Features = NDArray[np.float32]
#: Rows gathered at once where a caller goes through many.
_BLOCK = 512


@dataclass
class ProjectedFeatures:
    """Features float32 [replicates, dimensions] per item, in a folder of append-only segments.

    ``manifest.json`` names the finished segments with the sha256 and the item ids of each; a segment that a
    killed fit began goes on where it stopped. ``identity`` says what the features are of, but for the items.
    """

    directory: Path
    identity: str
    model_revision: str
    shape: tuple[int, int]
    _segments: list[Features] = field(default_factory=list)
    _places: dict[int, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Open what is there. TeacherNotUsable for features of something else, or altered ones."""
        if not (self.directory / MANIFEST).exists():
            return
        manifest = json.loads((self.directory / MANIFEST).read_text())
        if manifest["identity"] != self.identity or manifest["model_revision"] != self.model_revision:
            raise TeacherNotUsable(f"{self.directory} holds features of something else: remove it to fit again")
        for entry in manifest["segments"]:
            path = self.directory / entry["file"]
            if _sha256(path) != entry["sha256"]:
                raise TeacherNotUsable(f"{path} is not the file its manifest describes: remove its folder to fit again")
            self._take(path, entry["item_ids"])

    @property
    def item_ids(self) -> list[int]:
        """Ids of all items with features, in the order they were fitted."""
        return list(self._places)

    def missing(self, items: Sequence[TeacherItem]) -> list[TeacherItem]:
        """Those of the items that have no features yet."""
        return [item for item in items if item.item_id not in self._places]

    def rows(self, item_ids: Sequence[int]) -> Features:
        """Features [n, replicates, dimensions] of items that have them."""
        found = np.empty((len(item_ids), *self.shape), dtype=np.float32)
        for row, item_id in enumerate(item_ids):
            segment, place = self._places[item_id]
            found[row] = self._segments[segment][place]
        return found

    def blocks(self) -> Iterator[Features]:
        """The features of all items, [some, replicates, dimensions] at a time, in the order of ``item_ids``."""
        ids = self.item_ids
        for start in range(0, len(ids), _BLOCK):
            yield self.rows(ids[start : start + _BLOCK])

    def extend(
        self,
        items: Sequence[TeacherItem],
        compute: Callable[[Sequence[TeacherItem]], Features],
        chunk: int,
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> None:
        """Compute the features of new ``items``, ``chunk`` at a time, and keep them as one more segment.

        Resumes after a kill, to the same bits, when asked for the same items again.
        """
        identity = digest_of(self.identity, items, {})
        path = self.directory / f"features-{identity[:16]}.npy"
        store = RowStore.open(path, (len(items), *self.shape), np.float32, identity)
        for start in range(0, len(items), chunk):
            place = slice(start, min(start + chunk, len(items)))
            if not store.written[place].all():
                check()
                store.put(place, compute(items[place]))
            progress(place.stop, len(items))
        self._register(path, [item.item_id for item in items])

    def _register(self, path: Path, item_ids: list[int]) -> None:
        target = self.directory / MANIFEST
        segments = json.loads(target.read_text())["segments"] if target.exists() else []
        # Another worker may have fitted the same items meanwhile: its segment has the same name and values.
        if all(entry["file"] != path.name for entry in segments):
            segments.append({"file": path.name, "sha256": _sha256(path), "item_ids": item_ids})
            manifest = {"identity": self.identity, "model_revision": self.model_revision, "segments": segments}
            building = target.with_name(f".{target.name}-{os.getpid()}")
            building.write_text(json.dumps(manifest) + "\n")
            os.replace(building, target)
        self._take(path, item_ids)

    def _take(self, path: Path, item_ids: Sequence[int]) -> None:
        self._segments.append(np.load(path, mmap_mode="r"))
        number = len(self._segments) - 1
        self._places.update({item_id: (number, row) for row, item_id in enumerate(item_ids)})


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return "missing"
