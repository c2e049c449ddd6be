"""Rows computed chunk by chunk into a file, so that a killed pass over the corpus goes on where it stopped.

Why it exists: a pass takes minutes to days. Scores and sketches are stored row by row beside a written-flag each; a
store remembers what it is of, since going on with other queries or items would mix two answers into one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from byline.errors import TeacherNotUsable
from byline.teachers.ranking import TeacherItem


def digest_of(teacher_id: str, items: Sequence[TeacherItem], tensors: Mapping[str, torch.Tensor]) -> str:
    """32 hex digits of everything a pass depends on: teacher, items in order, and named tensors."""
    digest = hashlib.blake2b(teacher_id.encode(), digest_size=16)
    for item in items:
        digest.update(f"\0{item.item_id}\0{item.caption}".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tuple(tensor.shape)}\0{tensor.dtype}".encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)
    return digest.hexdigest()


@dataclass
class RowStore:
    """``rows`` [n, ...] and which of them are ``written`` [n], in memory or memory-mapped."""

    rows: NDArray[Any]
    written: NDArray[np.bool_]

    @classmethod
    def open(cls, path: Path | None, shape: tuple[int, ...], dtype: type[np.generic], identity: str) -> RowStore:
        """The store at ``path`` (an .npy beside .written.npy and .json), made when it is not there; None: in memory.

        Raises TeacherNotUsable for a store of another ``identity`` (``digest_of``) or shape.
        """
        if path is None:
            return cls(np.zeros(shape, dtype), np.zeros(shape[0], dtype=bool))
        flags, note = path.with_suffix(".written.npy"), path.with_suffix(".json")
        wanted = {"identity": identity, "shape": list(shape), "dtype": np.dtype(dtype).name}
        if note.exists():
            if json.loads(note.read_text()) != wanted:
                raise TeacherNotUsable(
                    f"{path} was begun with another teacher, other items or other queries: remove it to start anew"
                )
            return cls(np.lib.format.open_memmap(path, "r+"), np.lib.format.open_memmap(flags, "r+"))
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = np.lib.format.open_memmap(path, "w+", dtype, shape)
        written = np.lib.format.open_memmap(flags, "w+", np.bool_, shape[:1])
        # The note comes last and at once: a store without it was killed while it was made, and is made again.
        building = note.with_name(f".{note.name}-{os.getpid()}")
        building.write_text(json.dumps(wanted))
        os.replace(building, note)
        return cls(rows, written)

    def put(self, place: slice, values: NDArray[Any]) -> None:
        """Store rows; on disk before they are flagged, so that a flag never lies."""
        self.put_at(np.arange(len(self.rows))[place], values)

    def put_at(self, place: NDArray[np.int64], values: NDArray[Any]) -> None:
        """``put`` for rows that need not lie together."""
        self.rows[place] = values
        if isinstance(self.rows, np.memmap):
            self.rows.flush()
        self.written[place] = True
        if isinstance(self.written, np.memmap):
            self.written.flush()
