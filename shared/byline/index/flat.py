"""Exact search: FAISS ``IndexFlatIP``, and a matrix product where many queries come at once.

Why it exists: up to some ten thousand items an exhaustive scan is fast enough and exact, so it is the reference every
approximate tier is measured against. One query is bound by memory bandwidth; many at once share the reading of the
vectors (see ``scan``), and still every answer is the one the query gets alone.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Self

import faiss

from byline.errors import ReleaseCorrupt
from byline.index.exact_store import ExactStore, checked_queries, checked_rows, unanswered
from byline.index.files import read_file, with_ids, write_file
from byline.index.protocol import Ids, IndexStats, Vectors
from byline.index.scan import MatrixScan, Scan, exact_by_scan

FACTORY = "Flat"
#: From so many queries on one matrix product is faster than a scan for each.
SCAN_FROM = 4


class FlatIndex:
    """Exact inner-product search. Immutable once built or loaded."""

    def __init__(self, index: Any, ids: Ids, scan: Scan | None = None, scan_from: int = SCAN_FROM,
                 build_seconds: float | None = None) -> None:
        """Wrap an ``IndexIDMap`` over an ``IndexFlatIP``; use ``build`` or ``load`` instead.

        ``scan`` finds candidates for batches of at least ``scan_from`` queries; a GPU's does for single ones too.
        """
        self._index = index
        self._store = ExactStore(ids, faiss.downcast_index(index.index))
        self._scan = scan or MatrixScan(self._store.rows)
        self._scan_from = scan_from
        self._build_seconds = build_seconds

    @property
    def ntotal(self) -> int:
        """Vectors held."""
        return self._store.ntotal

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return self._store.dim

    @property
    def factory(self) -> str:
        """The FAISS factory string."""
        return FACTORY

    @property
    def ids(self) -> Ids:
        """All ids [ntotal], ascending."""
        return self._store.ids

    @property
    def stats(self) -> IndexStats:
        """What it costs: the vectors and 8 bytes of id."""
        size = 4.0 * self.dim + 8
        return IndexStats(FACTORY, self.ntotal, self.dim, size, size, self._build_seconds)

    @property
    def store(self) -> ExactStore:
        """The vectors by position."""
        return self._store

    @classmethod
    def build(cls, ids: Ids, vectors: Vectors) -> Self:
        """An index of ``vectors`` [n, d] under ``ids`` [n]. ValueError: shapes, repeated ids, non-finite values."""
        begun = time.perf_counter()
        ids, vectors = checked_rows(ids, vectors)
        index = with_ids(faiss.IndexFlatIP(vectors.shape[1]))
        index.add_with_ids(vectors, ids)
        return cls(index, ids, build_seconds=time.perf_counter() - begun)

    def scanned_by(self, scan: Scan) -> FlatIndex:
        """The same index, its candidates found by another engine (a GPU): the answers stay the same."""
        return FlatIndex(self._index, self.ids, scan, 1, self._build_seconds)

    def search(self, queries: Vectors, k: int, exclude: Ids | None = None) -> tuple[Vectors, Ids]:
        """The k best of every query (see ``VectorIndex.search``). FeatureMismatch for another width."""
        queries = checked_queries(queries, k, self.dim)
        allowed = self._store.allowed(exclude)
        scores, positions = unanswered(len(queries), k)
        if len(queries) >= self._scan_from and allowed.count > k:
            exact_by_scan(self._store, self._scan, queries, k, allowed, scores, positions)
        else:
            self._store.exact(queries, k, allowed, scores, positions)
        return scores, self._store.named(positions)

    def vectors(self, ids: Ids) -> Vectors:
        """The vectors [n, d] of ``ids`` [n], in their order. KeyError names an id that is not held."""
        return self._store.vectors(ids)

    def save(self, path: Path) -> None:
        """Write the index to one file."""
        write_file(self._index, path)

    @classmethod
    def load(cls, path: Path, mmap: bool = True) -> Self:
        """Read a file written by ``save``. ReleaseCorrupt when it is missing, broken or another kind of index."""
        index, inner, ids = read_file(path, mmap)
        if not isinstance(inner, faiss.IndexFlatIP):
            raise ReleaseCorrupt(f"{path.name} holds a {type(inner).__name__}, not a flat index", file=path.name)
        return cls(index, ids)
