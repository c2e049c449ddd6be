"""Features of a corpus on disk: memory-mapped shards keyed by item id, resumable, bound to one spec.

Why it exists: encoding a corpus takes hours at scale and happens once per spec; a killed run must continue
where it was, and features made with another preprocessing must never slip in. A row counts only once its
flag is on disk, which happens after the row itself is.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from byline.errors import FeatureMismatch
from byline.features.encoder import Features
from byline.features.extractor import FeatureExtractor
from byline.features.spec import FeatureSpec

_SCHEMA = 1
_MANIFEST = "manifest.json"
_SHARD = "shard-{:05d}"
ROWS_PER_SHARD = 4096
#: Stands in the place of an item that was withdrawn; its row is zeros.
FORGOTTEN = -1

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Shard:
    """Three mapped files of the same length: ids, features, and which rows are complete."""

    ids: NDArray[np.int64]
    features: NDArray[np.float32]
    written: NDArray[np.uint8]


class FeatureStore:
    """Feature rows of one corpus under one spec. One writer at a time (a lock file), any number of readers."""

    def __init__(self, directory: Path, spec: FeatureSpec, corpus_id: str, rows_per_shard: int = ROWS_PER_SHARD):
        """Open, or create. FeatureMismatch when the directory holds features of another spec or corpus."""
        self.directory = directory
        self.spec = spec
        self.corpus_id = corpus_id
        expected: dict[str, object] = {
            "schema": _SCHEMA, "corpus_id": corpus_id, "spec": spec.name, "dims": list(spec.dims),
            "preprocessing_hash": spec.preprocessing_hash,
        }  # fmt: skip
        directory.mkdir(parents=True, exist_ok=True)
        with self._writing():
            self._rows_per_shard = self._agree(expected, rows_per_shard)
            for stale in directory.glob(".new-*"):
                shutil.rmtree(stale)
        self._shards: list[_Shard] = []
        self._position: dict[int, tuple[int, int]] = {}
        self._seen: list[int] = []
        self._refresh()

    @property
    def ids(self) -> Ids:
        """Ids of all complete rows, in the order they were written."""
        self._refresh()
        return np.fromiter(self._position, dtype=np.int64, count=len(self._position))

    def __len__(self) -> int:
        self._refresh()
        return len(self._position)

    def missing(self, item_ids: Sequence[int]) -> list[int]:
        """Those of the ids that have no complete row yet, in the given order."""
        self._refresh()
        return [int(i) for i in item_ids if int(i) not in self._position]

    def matrix(self, item_ids: Sequence[int] | Ids | None = None) -> Features:
        """Features [n, dim] of these ids, or of all in the order of ``ids``.

        A whole single shard comes back as a read-only map; anything else is gathered into memory.
        FeatureMismatch names an id without a row.
        """
        self._refresh()
        if item_ids is None and sum(self._seen) != len(self._position):
            item_ids = self.ids  # rows of withdrawn items lie between
        if item_ids is None:
            parts = [shard.features[:seen] for shard, seen in zip(self._shards, self._seen, strict=True)]
            return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty((0, self.spec.dim), np.float32)])
        rows = np.empty((len(item_ids), self.spec.dim), dtype=np.float32)
        for n, item_id in enumerate(item_ids):
            place = self._position.get(int(item_id))
            if place is None:
                raise FeatureMismatch(f"item {item_id} has no features in {self.directory.name}", item_id=item_id)
            rows[n] = self._shards[place[0]].features[place[1]]
        return rows

    def append(self, item_ids: Sequence[int] | Ids, features: Features) -> int:
        """Write rows durably and return how many were new; ids that have a row already are left as they are.

        FeatureMismatch for a wrong shape, values that are not finite, or an id given twice.
        """
        ids = np.asarray(item_ids, dtype=np.int64)
        if features.shape != (len(ids), self.spec.dim) or not bool(np.isfinite(features).all()):
            raise FeatureMismatch(f"features of shape {features.shape} for {len(ids)} items, or not finite")
        if len(np.unique(ids)) != len(ids):
            raise FeatureMismatch("an item id is given twice")
        with self._writing():
            self._refresh()
            fresh = np.array([int(i) not in self._position for i in ids], dtype=bool)
            self._write(ids[fresh], features[fresh])
            self._refresh()
        return int(fresh.sum())

    # -- files ----------------------------------------------------------------------------------

    def _writing(self) -> AbstractContextManager[None]:
        """Hold the writer's lock while a few rows are written."""
        return self._locked(".lock")

    def extracting(self) -> AbstractContextManager[None]:
        """Hold the extractor's lock while a corpus is encoded: a second process waits, then finds the rows."""
        return self._locked(".extracting")

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """An exclusive lock; the kernel gives it back when a process is killed."""
        with (self.directory / name).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _agree(self, expected: dict[str, object], rows_per_shard: int) -> int:
        path = self.directory / _MANIFEST
        if not path.exists():
            temporary = path.with_suffix(".new")
            with temporary.open("w") as file:
                json.dump({**expected, "rows_per_shard": rows_per_shard}, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            kept = int(found.pop("rows_per_shard"))
        except (ValueError, KeyError, AttributeError) as error:
            raise FeatureMismatch(f"{path} is damaged; delete {self.directory} and extract again") from error
        different = [name for name in expected if found.get(name) != expected[name]]
        if different:
            name = different[0]
            raise FeatureMismatch(
                f"{self.directory} holds features with {name} {found.get(name)}, not {expected[name]}; "
                "use another directory",
                field=name,
            )
        return kept

    def _refresh(self) -> None:
        """Take notice of rows and shards written since, by this process or another."""
        while (self.directory / _SHARD.format(len(self._shards))).is_dir():
            self._shards.append(self._open_shard(len(self._shards)))
            self._seen.append(0)
        for number, shard in enumerate(self._shards):
            if self._seen[number] == len(shard.written):
                continue
            # Rows are written in order: the complete ones are those before the first missing flag.
            done = int(np.argmin(shard.written)) if not bool(shard.written.all()) else len(shard.written)
            for row in range(self._seen[number], done):
                if shard.ids[row] != FORGOTTEN:
                    self._position[int(shard.ids[row])] = (number, row)
            self._seen[number] = done

    def _open_shard(self, number: int, mode: Any = "r") -> _Shard:
        folder = self.directory / _SHARD.format(number)
        try:
            ids, features, written = (
                np.load(folder / f"{name}.npy", mmap_mode=mode, allow_pickle=False)
                for name in ("ids", "features", "written")
            )
        except (OSError, ValueError) as error:
            raise FeatureMismatch(f"{folder} is damaged; delete {self.directory} and extract again") from error
        if features.shape != (len(ids), self.spec.dim) or written.shape != ids.shape:
            raise FeatureMismatch(f"{folder} is damaged; delete {self.directory} and extract again")
        return _Shard(ids, features, written)

    def _create_shard(self) -> None:
        folder = Path(tempfile.mkdtemp(dir=self.directory, prefix=".new-"))
        rows = self._rows_per_shard
        for name, shape, kind in (
            ("ids", (rows,), np.int64), ("features", (rows, self.spec.dim), np.float32), ("written", (rows,), np.uint8),
        ):  # fmt: skip
            np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=kind, shape=shape).flush()
        folder.rename(self.directory / _SHARD.format(len(self._shards)))

    def _write(self, ids: Ids, features: Features) -> None:
        done = 0
        while done < len(ids):
            if not self._shards or self._seen[-1] == self._rows_per_shard:
                self._create_shard()
                self._refresh()
            start = self._seen[-1]
            count = min(len(ids) - done, self._rows_per_shard - start)
            shard = self._open_shard(len(self._shards) - 1, "r+")
            shard.ids[start : start + count] = ids[done : done + count]
            shard.features[start : start + count] = features[done : done + count]
            _flush(shard.ids)
            _flush(shard.features)
            shard.written[start : start + count] = 1
            _flush(shard.written)
            done += count
            self._refresh()


def _flush(array: Any) -> None:
    array.flush()


def fill_store(
    store: FeatureStore, extractor: FeatureExtractor, item_ids: Sequence[int],
    pair_of: Callable[[int], tuple[Image.Image, str] | None], progress: Callable[[int, int], None] | None = None,
    batch: int = 64,
) -> int:  # fmt: skip
    """Extract what the store lacks of ``item_ids`` and return how many rows were added.

    ``pair_of(item_id)`` gives image and caption, None for an item that is to be left out; ``progress(done, total)``
    counts the items given. Killed at any moment, the next call continues behind the last complete batch.
    """
    if extractor.preprocessing_hash != store.spec.preprocessing_hash:
        raise FeatureMismatch("the extractor is not the one the store was opened for", spec=store.spec.name)
    total = len(item_ids)
    added = 0
    if not store.missing(item_ids):
        return 0
    # Trainer and curation want the same corpus at the same moment: one encodes it, the other waits for the rows.
    with store.extracting():
        todo = store.missing(item_ids)
        for start in range(0, len(todo), batch):
            ids = todo[start : start + batch]
            pairs = {item_id: pair for item_id in ids if (pair := pair_of(item_id)) is not None}
            images, texts = [image for image, _ in pairs.values()], [text for _, text in pairs.values()]
            added += store.append(list(pairs), extractor.extract(images, texts)) if pairs else 0
            if progress:
                progress(total - len(todo) + start + len(ids), total)
    return added


def stored_ids(directory: Path) -> Ids:
    """The ids of the complete rows in a store's directory, whatever its spec."""
    parts = [np.load(shard / "ids.npy")[np.load(shard / "written.npy") == 1] for shard in _shards_of(directory)]
    ids: Ids = np.concatenate([*parts, np.empty(0, np.int64)])
    return ids[ids >= 0]


def forget_rows(directory: Path, item_ids: Sequence[int] | Ids) -> int:
    """Overwrite the rows of these items with nothing, durably; how many there were. The store may be in use."""
    gone = np.asarray(item_ids, dtype=np.int64)
    found = 0
    for shard in _shards_of(directory):
        with (directory / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            ids = np.load(shard / "ids.npy", mmap_mode="r+")
            rows = np.flatnonzero(np.isin(ids, gone))
            if not len(rows):
                continue
            features = np.load(shard / "features.npy", mmap_mode="r+")
            features[rows] = 0
            _flush(features)
            ids[rows] = FORGOTTEN
            _flush(ids)
            found += len(rows)
    return found


def _shards_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("shard-*") if (path / "written.npy").is_file())
