"""What every index promises, whichever engine holds the vectors.

Why it exists: exact search, quantised search and a distributed engine are interchangeable behind these
few members; the release's manifest records which one was built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]

#: Item id where fewer than k items are left; its score is -inf.
NO_ITEM = -1


class VectorIndex(Protocol):
    """Vectors with 64-bit ids, searched by inner product (higher = more influential)."""

    @property
    def ntotal(self) -> int:
        """Vectors held."""

    @property
    def dim(self) -> int:
        """Width of a vector."""

    @property
    def factory(self) -> str:
        """The FAISS factory string recorded in the manifest, such as ``Flat``."""

    @property
    def ids(self) -> Ids:
        """All ids [ntotal], ascending."""

    @classmethod
    def build(cls, ids: Ids, vectors: Vectors) -> Self:
        """An index of ``vectors`` [n, d] float32 under ``ids`` [n] (distinct, not negative; any order)."""

    def search(self, queries: Vectors, k: int, exclude: Ids | None = None) -> tuple[Vectors, Ids]:
        """The k best items of every query: scores [q, k] descending and ids [q, k]; ties by id, ascending.

        Items in ``exclude`` are left out *before* the k best are chosen, so k answers come back as long as
        k items remain; beyond that the rows are padded with NO_ITEM and -inf. An answer does not depend
        on which other queries are in the batch. Safe for concurrent readers.
        """

    def vectors(self, ids: Ids) -> Vectors:
        """The vectors [n, d] of ``ids`` [n], in their order. KeyError names an id that is not held."""

    def save(self, path: Path) -> None:
        """Write one file."""

    @classmethod
    def load(cls, path: Path, mmap: bool = True) -> Self:
        """Read a file written by ``save``; with ``mmap`` the vectors stay on disk and are shared by processes."""
