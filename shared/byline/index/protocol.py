"""What every index promises, whichever engine holds the vectors.

Why it exists: exact search, quantised search, a GPU and a distributed engine are interchangeable behind these
few members; the release's manifest records which one was built.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]
#: Rows of an index, in the order of its ids; an index's own numbers for its items.
Positions = NDArray[np.int64]

#: Item id where fewer than k items are left; its score is -inf.
NO_ITEM = -1


@dataclass(frozen=True, slots=True)
class IndexStats:
    """What an index costs.

    ``bytes_per_item`` is what a search runs over: codes, links, list entries and ids, so what should stay in memory.
    ``stored_bytes_per_item`` adds the exact vectors that only the best candidates of a query are compared with.
    ``build_seconds`` is None for an index that was loaded.
    """

    factory: str
    ntotal: int
    dim: int
    bytes_per_item: float
    stored_bytes_per_item: float
    build_seconds: float | None


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

    @property
    def stats(self) -> IndexStats:
        """What it costs."""

    @classmethod
    def build(cls, ids: Ids, vectors: Vectors) -> Self:
        """An index of ``vectors`` [n, d] float32 under ``ids`` [n] (distinct, not negative; any order)."""

    def search(self, queries: Vectors, k: int, exclude: Ids | None = None) -> tuple[Vectors, Ids]:
        """The k best items of every query: scores [q, k] descending and ids [q, k]; ties by id, ascending.

        Items in ``exclude`` are left out *before* the k best are chosen, so k answers come back as long as
        k items remain; beyond that the rows are padded with NO_ITEM and -inf. An answer does not depend
        on which other queries are in the batch. Scores are exact inner products at every tier; only which items
        are found may be approximate. Safe for concurrent readers.
        """

    def vectors(self, ids: Ids) -> Vectors:
        """The vectors [n, d] of ``ids`` [n], in their order. KeyError names an id that is not held."""

    def save(self, path: Path) -> None:
        """Write one file."""

    @classmethod
    def load(cls, path: Path, mmap: bool = True) -> Self:
        """Read a file written by ``save``; with ``mmap`` the vectors stay on disk and are shared by processes."""
