"""Losses on disk, found again by what they are of: the baselines of a corpus, and unfinished scores.

Why it exists: the loss of an item under the unedited weights is the same for every query, so it is
measured once per model and noise, by whichever process needs it first; and a killed score must go
on where it was. One row is one cell: the losses of one (item, caption, orientation) over the draws
of one replicate.

Every process appends whole rows to a segment file of its own, so any number may write at once, with
no lock. A row carries a checksum over its key and values: what is torn or altered is not seen at
all, and so is measured again, never trusted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

#: (what the losses are of, replicate); the text is ``noise.item_key``'s.
CellKey = tuple[str, int]
_SUFFIX = ".losses"
_HEADER = 256


class LossStore(Protocol):
    """Rows of ``width`` float64 losses by cell."""

    def read(self, cells: Sequence[CellKey]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Losses [n, width] and which of them are known [n]; unknown rows are NaN."""
        ...

    def add(self, cells: Sequence[CellKey], losses: NDArray[np.float64]) -> None:
        """Keep ``losses`` [n, width]."""
        ...

    def refresh(self) -> None:
        """See what other processes have added since."""
        ...


class LossMemory:
    """Losses of this process alone, gone with it."""

    def __init__(self, width: int) -> None:
        """Empty."""
        self._width = width
        self._rows: dict[CellKey, NDArray[np.float64]] = {}

    def read(self, cells: Sequence[CellKey]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """See ``LossStore``."""
        known = np.array([cell in self._rows for cell in cells], dtype=bool)
        losses = np.full((len(cells), self._width), np.nan)
        for row in np.flatnonzero(known).tolist():
            losses[row] = self._rows[cells[row]]
        return losses, known

    def add(self, cells: Sequence[CellKey], losses: NDArray[np.float64]) -> None:
        """See ``LossStore``."""
        self._rows.update(zip(cells, losses.copy(), strict=True))

    def refresh(self) -> None:
        """Nobody else writes here."""


class LossFiles:
    """Losses in segment files below one directory, shared by all processes that open it.

    Rows are found by the first eight bytes of their key's digest, kept sorted: 16 bytes of memory a
    row, so the two million rows of a COCO corpus take 32 MB. All sixteen bytes are compared.
    """

    def __init__(self, directory: Path, width: int, meaning: str) -> None:
        """Open, or begin; ``meaning`` says what else the losses depend on, and must match to be read."""
        self.directory = directory
        self._width = width
        text = json.dumps({"format": 1, "width": width, "meaning": hashlib.sha256(meaning.encode()).hexdigest()})
        self._header = text.encode().ljust(_HEADER - 1) + b"\n"
        self._row = np.dtype([("key", "V16"), ("crc", "<u4"), ("values", "<f8", (width,))])
        self._segments: dict[str, tuple[int, NDArray[np.void]]] = {}
        self._names: list[str] = []
        self._ids = np.empty(0, dtype=np.uint64)
        self._places = np.empty((0, 2), dtype=np.int64)
        self._own: Path | None = None
        self.refresh()

    def refresh(self) -> None:
        """See ``LossStore``."""
        fresh_ids, fresh_places = [self._ids], [self._places]
        for path in sorted(self.directory.glob(f"*{_SUFFIX}")):
            seen = self._segments[path.name][0] if path.name in self._segments else 0
            rows = self._map(path)
            if rows is None or len(rows) <= seen:
                continue
            if path.name not in self._segments:
                self._names.append(path.name)
            self._segments[path.name] = (len(rows), rows)
            sound = np.array([_checksum(row) == row["crc"] for row in rows[seen:]], dtype=bool)
            if not sound.all():
                log.warning("%s: %d damaged rows are measured again", path, int((~sound).sum()))
            numbers = seen + np.flatnonzero(sound)
            fresh_ids.append(_short(rows["key"][numbers]))
            fresh_places.append(np.stack([np.full(len(numbers), self._names.index(path.name)), numbers], axis=1))
        if len(fresh_ids) > 1:
            ids = np.concatenate(fresh_ids)
            order = np.argsort(ids, kind="stable")
            self._ids, self._places = ids[order], np.concatenate(fresh_places)[order]

    def read(self, cells: Sequence[CellKey]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """See ``LossStore``."""
        losses = np.full((len(cells), self._width), np.nan)
        known = np.zeros(len(cells), dtype=bool)
        digests = [_digest(cell) for cell in cells]
        ids = np.array([int.from_bytes(digest[:8], "little") for digest in digests], dtype=np.uint64)
        for row, start in enumerate(np.searchsorted(self._ids, ids)):
            while start < len(self._ids) and self._ids[start] == ids[row] and not known[row]:
                segment, number = self._places[start]
                found = self._segments[self._names[segment]][1][number]
                if found["key"].tobytes() == digests[row]:
                    losses[row], known[row] = found["values"], True
                start += 1
        return losses, known

    def add(self, cells: Sequence[CellKey], losses: NDArray[np.float64]) -> None:
        """See ``LossStore``; durable when it returns. A row is seen by ``read`` after the next ``refresh``."""
        rows = np.zeros(len(cells), dtype=self._row)
        for row, cell, values in zip(rows, cells, losses, strict=True):
            row["key"], row["values"] = np.void(_digest(cell)), values
            row["crc"] = _checksum(row)
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._own is None or not self._own.exists():
            self._own = self.directory / f"{uuid.uuid4().hex}{_SUFFIX}"
        with self._own.open("ab") as file:
            file.write((self._header if file.tell() == 0 else b"") + rows.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def discard(self) -> None:
        """Remove the directory: what it was for is finished."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _map(self, path: Path) -> NDArray[np.void] | None:
        """Whole rows of a segment, memory-mapped; None where it is of something else or was removed meanwhile."""
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                header = file.read(_HEADER)
            count = (size - _HEADER) // self._row.itemsize
            if count < 1:
                return None
            if header != self._header:
                log.warning("%s holds losses of something else and is not used", path)
                return None
            return np.memmap(path, dtype=self._row, mode="r", offset=_HEADER, shape=(count,))
        except FileNotFoundError:
            return None


def remove_older(directory: Path, before: float) -> None:
    """Remove the folders in ``directory`` in which nothing has changed since ``before`` (a Unix time)."""
    for folder in directory.glob("*/"):
        try:
            if max(path.stat().st_mtime for path in (folder, *folder.iterdir())) < before:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            continue  # another process was faster


def _digest(cell: CellKey) -> bytes:
    return hashlib.blake2b(f"{cell[0]}/{cell[1]}".encode(), digest_size=16).digest()


def _short(keys: NDArray[np.void]) -> NDArray[np.uint64]:
    """The first eight of the sixteen bytes of every key."""
    return np.frombuffer(keys.tobytes(), dtype="<u8")[::2].astype(np.uint64)


def _checksum(row: np.void) -> int:
    return zlib.crc32(row["values"].tobytes(), zlib.crc32(row["key"].tobytes()))
