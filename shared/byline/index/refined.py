"""Approximate tiers: a small structure proposes candidates, the exact vectors decide among them.

Why it exists: the tiers differ in how candidates are found; everything else is one piece of code: the filter before
top-k, exact scores, ties, padding, independence of the batch. The exact vectors lie in the same file, mapped, and only
the candidates' rows of them are ever read, so what must stay in memory are the codes.

A filter must not cost recall. With few items left (``EXACT_ROWS``), or k large against what is left, the search is an
exhaustive one over the allowed rows. Otherwise the tier widens itself, query by query, by the share of allowed items
it meets, and gives up in favour of exhaustive search where hardly any are met: removing 99 % of the items, or exactly
those around the query, changes the cost and not the recall.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import faiss
import numpy as np
from numpy.typing import NDArray

from byline.errors import ReleaseCorrupt
from byline.index.exact_store import QUERIES_PER_CALL, Allowed, ExactStore, best, checked_queries, unanswered
from byline.index.files import read_file, write_file
from byline.index.protocol import NO_ITEM, Ids, IndexStats, Positions, Vectors

#: Up to so many allowed items an exhaustive scan over them costs about what any tier does, and is exact.
EXACT_ROWS = 4_096
#: Candidates beyond ``k_factor * k``.
_MORE = 16
_ADDED_AT_ONCE = 131_072


class RefinedIndex(ABC):
    """An index that finds candidates by codes, lists or links and scores them exactly. Immutable."""

    #: FAISS class of the part that finds candidates.
    kind: ClassVar[str]

    def __init__(self, index: Any, ids: Ids, build_seconds: float | None = None) -> None:
        """Wrap an ``IndexIDMap``; use ``build`` or ``load`` instead. ReleaseCorrupt for another kind of index."""
        self._index = index
        inner = faiss.downcast_index(index.index)
        self._base, flat = self._parts(inner)
        #: Candidates for each answer that is asked for.
        self.k_factor = max(1.0, float(getattr(inner, "k_factor", 1.0)))
        self._store = ExactStore(ids, flat)
        self._build_seconds = build_seconds

    @classmethod
    def _parts(cls, inner: Any) -> tuple[Any, Any]:
        """What finds candidates, and the ``IndexFlatIP`` of exact vectors."""
        if not isinstance(inner, faiss.IndexRefine):
            raise ReleaseCorrupt(f"the file holds a {type(inner).__name__}, not a {cls.kind} with exact vectors")
        base, flat = faiss.downcast_index(inner.base_index), faiss.downcast_index(inner.refine_index)
        require_parts(cls.kind, base, flat)
        return base, flat

    @classmethod
    @abstractmethod
    def build(cls, ids: Ids, vectors: Vectors) -> Self:
        """See ``VectorIndex.build``."""

    @property
    def ntotal(self) -> int:
        """Vectors held."""
        return self._store.ntotal

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return self._store.dim

    @property
    def ids(self) -> Ids:
        """All ids [ntotal], ascending."""
        return self._store.ids

    @property
    @abstractmethod
    def factory(self) -> str:
        """The FAISS factory string; ``load_index`` needs it to open the file."""

    @property
    @abstractmethod
    def code_bytes(self) -> float:
        """Bytes per item of what finds candidates."""

    @property
    @abstractmethod
    def effort(self) -> dict[str, float]:
        """The search parameters, by name, as they stand in the file and in the manifest."""

    @abstractmethod
    def with_effort(self, effort: dict[str, float]) -> None:
        """Set what ``effort`` names. Only while the index is being built or chosen: readers may be anywhere later."""

    @property
    def stats(self) -> IndexStats:
        """What it costs."""
        size = self.code_bytes + 8
        return IndexStats(
            self.factory, self.ntotal, self.dim, size, size + 4.0 * self.dim, self._build_seconds
        )  # fmt: skip

    @property
    def store(self) -> ExactStore:
        """The exact vectors by position."""
        return self._store

    def search(self, queries: Vectors, k: int, exclude: Ids | None = None) -> tuple[Vectors, Ids]:
        """The k best of every query (see ``VectorIndex.search``). FeatureMismatch for another width."""
        queries = checked_queries(queries, k, self.dim)
        allowed = self._store.allowed(exclude)
        depth = int(self.k_factor * k) + _MORE
        exhaustive = allowed.count <= EXACT_ROWS or 4 * depth >= allowed.count
        if len(queries) == 1 and not exhaustive and (single := self._single(queries, k, depth, allowed)) is not None:
            return single
        scores, positions = unanswered(len(queries), k)
        if exhaustive:
            self._store.exact(queries, k, allowed, scores, positions)
            return scores, self._store.named(positions)
        selector = allowed.selector()
        for start in range(0, len(queries), QUERIES_PER_CALL):
            rows = slice(start, start + QUERIES_PER_CALL)
            self._fill(queries[rows], k, depth, allowed, selector, scores[rows], positions[rows])
        return scores, self._store.named(positions)

    def _single(self, query: Vectors, k: int, depth: int, allowed: Allowed) -> tuple[Vectors, Ids] | None:
        """What nearly every call is, one query [1, d] with candidates enough: the answer of ``_fill`` in fewer steps,
        each of which counts beside a search of half a millisecond. None where more is to be done."""
        selector = allowed.selector()
        rough, found = self._candidates(query, depth, allowed, selector)
        if found[0, -1] == NO_ITEM or rough[0, k] <= rough[0, -1]:
            return None
        kept = found[0, rough[0] > rough[0, -1]]  # without cut ties
        exact = self._store.scores(query, kept[None])[0]
        order = np.lexsort((kept, -exact))[:k]
        return exact[order][None], self._store.ids[kept[order]][None]

    def _fill(
        self, queries: Vectors, k: int, depth: int, allowed: Allowed, selector: Any, scores: Vectors,
        positions: Positions,
    ) -> None:  # fmt: skip
        """Answer a few queries. Those that come out short are asked again alone, so that none depends on another."""
        rough, found = self._candidates(queries, depth, allowed, selector)
        found = _without_cut_ties(rough, found)
        enough = (found != NO_ITEM).sum(axis=1) >= k
        for row in np.flatnonzero(~enough):
            alone, wider = queries[row : row + 1], depth
            while found[row, 0] != NO_ITEM and wider * 4 < allowed.count:
                wider *= 4
                again = _without_cut_ties(*self._candidates(alone, wider, allowed, selector))
                if (again != NO_ITEM).sum() >= k:
                    exact = self._store.scores(alone, again)
                    scores[row : row + 1], positions[row : row + 1] = best(exact, again, k)
                    break
            else:
                self._store.exact(alone, k, allowed, scores[row : row + 1], positions[row : row + 1])
        if enough.all():
            scores[:], positions[:] = best(self._store.scores(queries, found), found, k)
        elif enough.any():
            kept = np.ascontiguousarray(found[enough])
            exact = self._store.scores(np.ascontiguousarray(queries[enough]), kept)
            scores[enough], positions[enough] = best(exact, kept, k)

    @abstractmethod
    def _candidates(
        self, queries: Vectors, depth: int, allowed: Allowed, selector: Any
    ) -> tuple[Vectors, Positions]:
        """Rough scores [q, depth], descending, and positions; padded with NO_ITEM, an empty row asks for exhaustive
        search. More than ``depth`` items are allowed. A row's candidates must not depend on the other rows."""

    def vectors(self, ids: Ids) -> Vectors:
        """The exact vectors [n, d] of ``ids`` [n], in their order. KeyError names an id that is not held."""
        return self._store.vectors(ids)

    def save(self, path: Path) -> None:
        """Write the index to one file, search parameters included."""
        write_file(self._index, path)

    @classmethod
    def load(cls, path: Path, mmap: bool = True) -> Self:
        """Read a file written by ``save``. ReleaseCorrupt when it is missing, broken or another kind of index."""
        index, _, ids = read_file(path, mmap)
        return cls(index, ids)

    @classmethod
    def _training_rows(cls, vectors: Vectors) -> Vectors:
        """What codes and lists are fitted to."""
        return vectors

    @classmethod
    def _filled(cls, index: Any, ids: Ids, vectors: Vectors, begun: float) -> Self:
        """Train and fill ``index`` (under an ``IndexIDMap``) with rows that are in order, some at a time: a tier that
        turns the vectors would turn a copy of all of them."""
        index.train(cls._training_rows(vectors))
        for start in range(0, len(vectors), _ADDED_AT_ONCE):
            rows = slice(start, start + _ADDED_AT_ONCE)
            index.add_with_ids(vectors[rows], ids[rows])
        return cls(index, ids, time.perf_counter() - begun)


def _without_cut_ties(rough: Vectors, found: Positions) -> Positions:
    """``found`` without those that tie with the last of a full row: which of them came is the engine's whim."""
    full = found[:, -1] != NO_ITEM
    cut: NDArray[np.bool_] = (rough <= rough[:, -1:]) & full[:, None]
    return np.where(cut, NO_ITEM, found)


def require_parts(kind: str, base: Any, flat: Any) -> None:
    """ReleaseCorrupt unless ``base`` is of class ``kind`` and ``flat`` holds exact vectors for inner products."""
    exact = isinstance(flat, faiss.IndexFlat) and flat.metric_type == faiss.METRIC_INNER_PRODUCT
    if type(base).__name__ != kind or not exact:
        raise ReleaseCorrupt(f"the file holds a {type(base).__name__}, not a {kind} with exact vectors")
