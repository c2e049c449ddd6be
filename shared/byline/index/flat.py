"""Exact search: FAISS ``IndexFlatIP`` under an ``IndexIDMap2``.

Why it exists: up to about 100,000 items an exhaustive scan is fast enough and exact, so it is the
reference every approximate tier is measured against. Rows are stored in ascending id order: a position
then orders like an id, which makes ties deterministic and the filter a plain bitmap.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np

from byline.errors import FeatureMismatch, ReleaseCorrupt
from byline.index.protocol import NO_ITEM, Ids, VectorIndex, Vectors

FACTORY = "Flat"
# The stubs describe the C++ signatures; the Python wrappers take arrays and keywords.
_native: Any = faiss
# From 20 queries on FAISS changes to a matrix product whose rounding differs: an answer would depend on
# its neighbours in the batch. Stay below, always.
_QUERIES_PER_CALL = 16
_DESERIALISATION = threading.Lock()


class FlatIndex:
    """Exact inner-product search. Immutable once built or loaded."""

    def __init__(self, index: Any) -> None:
        """Wrap an ``IndexIDMap2`` over an ``IndexFlatIP``; use ``build`` or ``load`` instead."""
        self._index = index
        self._flat = faiss.downcast_index(index.index)
        self._ids: Ids = faiss.vector_to_array(index.id_map).astype(np.int64)
        if len(self._ids) != self._flat.ntotal or (len(self._ids) > 1 and not bool((np.diff(self._ids) > 0).all())):
            raise ReleaseCorrupt("the index's ids are not distinct, ascending and one for each vector")

    @property
    def ntotal(self) -> int:
        """Vectors held."""
        return int(self._flat.ntotal)

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return int(self._flat.d)

    @property
    def factory(self) -> str:
        """The FAISS factory string."""
        return FACTORY

    @property
    def ids(self) -> Ids:
        """All ids [ntotal], ascending."""
        return self._ids

    @classmethod
    def build(cls, ids: Ids, vectors: Vectors) -> Self:
        """An index of ``vectors`` [n, d] under ``ids`` [n]. ValueError: shapes, repeated ids, non-finite values."""
        ids = np.ascontiguousarray(ids, dtype=np.int64)
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if vectors.ndim != 2 or ids.shape != (len(vectors),):
            raise ValueError(f"ids {ids.shape} and vectors {vectors.shape} do not belong together")
        if len(np.unique(ids)) != len(ids) or (len(ids) and int(ids.min()) < 0):
            raise ValueError("ids must be distinct and not negative")
        if not bool(np.isfinite(vectors).all()):
            raise ValueError("vectors must be finite")
        order = np.argsort(ids)
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(vectors.shape[1]))
        index.add_with_ids(np.ascontiguousarray(vectors[order]), ids[order])
        return cls(index)

    def search(self, queries: Vectors, k: int, exclude: Ids | None = None) -> tuple[Vectors, Ids]:
        """The k best of every query (see ``VectorIndex.search``). FeatureMismatch for another width."""
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise FeatureMismatch(
                f"queries of shape {queries.shape} do not fit an index of width {self.dim}", dim=self.dim
            )
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        if not bool(np.isfinite(queries).all()):
            raise FeatureMismatch("a query vector is not finite")
        selector, available = self._selector(exclude)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        ids = np.full((len(queries), k), NO_ITEM, dtype=np.int64)
        if available:
            for start in range(0, len(queries), _QUERIES_PER_CALL):
                rows = slice(start, start + _QUERIES_PER_CALL)
                self._search_chunk(queries[rows], min(k, available), available, selector, scores[rows], ids[rows])
        return scores, ids

    def _selector(self, exclude: Ids | None) -> tuple[Any, int]:
        """A bitmap over positions that lets the kept items through (None = all), and how many those are."""
        if exclude is None or len(exclude) == 0 or self.ntotal == 0:
            return None, self.ntotal
        wanted = np.unique(np.asarray(exclude, dtype=np.int64))
        positions = np.searchsorted(self._ids, wanted)
        known = positions < self.ntotal
        positions, wanted = positions[known], wanted[known]
        keep = np.ones(self.ntotal, dtype=bool)
        keep[positions[self._ids[positions] == wanted]] = False
        available = int(keep.sum())
        if available == self.ntotal:
            return None, available
        return _native.IDSelectorBitmap(np.packbits(keep, bitorder="little")), available

    def _search_chunk(self, queries: Vectors, k: int, available: int, selector: Any, scores: Vectors, ids: Ids) -> None:
        """Fill ``scores`` and ``ids``; look further while a tie at the last place could hide a smaller id."""
        parameters = _native.SearchParameters(sel=selector) if selector is not None else None
        depth = min(available, k + 8)
        while True:
            found, positions = self._flat.search(queries, depth, params=parameters)
            if depth == available or not bool((found[:, -1] >= found[:, k - 1]).any()):
                break
            depth = min(available, 2 * depth)
        for row, (score, position) in enumerate(zip(found, positions, strict=True)):
            order = np.lexsort((position, -score))[:k]
            scores[row, :k] = score[order]
            ids[row, :k] = self._ids[position[order]]

    def vectors(self, ids: Ids) -> Vectors:
        """The vectors [n, d] of ``ids`` [n], in their order. KeyError names an id that is not held."""
        wanted = np.asarray(ids, dtype=np.int64)
        positions = np.minimum(np.searchsorted(self._ids, wanted), max(self.ntotal - 1, 0))
        unknown = wanted[self._ids[positions] != wanted] if self.ntotal else wanted
        if len(unknown):
            raise KeyError(f"item {unknown[0]} is not in the index")
        found: Vectors = self._flat.reconstruct_batch(positions) if len(wanted) else np.empty((0, self.dim), np.float32)
        return found

    def save(self, path: Path) -> None:
        """Write the index to one file."""
        faiss.write_index(self._index, str(path))

    @classmethod
    def load(cls, path: Path, mmap: bool = True) -> Self:
        """Read a file written by ``save``. ReleaseCorrupt when it is missing, broken or another kind of index.

        FAISS parses native structures: only open files whose digest was checked (``releases.loader`` does).
        """
        flags = faiss.IO_FLAG_MMAP_IFC if mmap else 0
        try:
            with _DESERIALISATION:  # the limit is global to the process
                faiss.set_deserialization_vector_byte_limit(max(path.stat().st_size, 1))
                index = faiss.read_index(str(path), flags)
        except (RuntimeError, OSError) as error:
            raise ReleaseCorrupt(f"{path.name} cannot be read as an index", file=path.name) from error
        if not isinstance(index, faiss.IndexIDMap) or not isinstance(
            faiss.downcast_index(index.index), faiss.IndexFlatIP
        ):
            raise ReleaseCorrupt(f"{path.name} is a {type(index).__name__}, not a flat index with ids", file=path.name)
        return cls(index)


def build_index(ids: Ids, vectors: Vectors, factory: str = FACTORY) -> VectorIndex:
    """An index of the asked kind. ValueError for a factory string that is not known here."""
    if factory != FACTORY:
        raise ValueError(f"unknown index factory {factory!r}; known: {FACTORY!r}")
    return FlatIndex.build(ids, vectors)


def load_index(path: Path, factory: str = FACTORY, mmap: bool = True) -> VectorIndex:
    """Open the index of a release by the factory string of its manifest. ReleaseCorrupt when it does not fit."""
    if factory != FACTORY:
        raise ReleaseCorrupt(f"unknown index factory {factory!r}; this version knows {FACTORY!r}", factory=factory)
    return FlatIndex.load(path, mmap)
