"""The vectors themselves, by position: the filter, exact scores, exact search. Every tier stands on one of these.

Why it exists: an approximate tier only decides *which* items are worth comparing; the scores it answers with, the
order of ties and the meaning of a filter must be those of exact search, to the bit. Rows are stored in ascending id
order: a position then orders like an id, which makes ties deterministic and the filter a plain bitmap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from byline.errors import FeatureMismatch, ReleaseCorrupt
from byline.index.protocol import NO_ITEM, Ids, Positions, Vectors

# The stubs describe the C++ signatures; the Python wrappers take arrays and keywords.
native: Any = faiss
#: FAISS changes to a matrix product, with other rounding, for many queries at a time (from 20 in older versions): an
#: answer would depend on its neighbours in the batch. Stay below, always.
QUERIES_PER_CALL = 16
#: Looked for beyond the k best, so that a tie at the last place is usually seen at once.
SLACK = 8


@dataclass(frozen=True)
class Allowed:
    """Which positions may be answered: ``mask`` [ntotal] (None: all), and how many those are."""

    mask: NDArray[np.bool_] | None
    count: int

    def selector(self) -> Any:
        """A FAISS selector, None for all. FAISS keeps no reference: hold it until the search is over."""
        return None if self.mask is None else native.IDSelectorBitmap(np.packbits(self.mask, bitorder="little"))


def checked_rows(ids: Ids, vectors: Vectors) -> tuple[Ids, Vectors]:
    """Both in ascending id order, float32 and contiguous. ValueError: shapes, repeated ids, non-finite values."""
    ids = np.ascontiguousarray(ids, dtype=np.int64)
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or ids.shape != (len(vectors),):
        raise ValueError(f"ids {ids.shape} and vectors {vectors.shape} do not belong together")
    order = np.argsort(ids)
    ordered = ids[order]
    if len(ids) and (int(ordered[0]) < 0 or bool((np.diff(ordered) == 0).any())):
        raise ValueError("ids must be distinct and not negative")
    if not bool(np.isfinite(vectors).all()):
        raise ValueError("vectors must be finite")
    in_order = bool((ordered == ids).all())  # then no second copy: a million rows of 768 are 3 GB
    return ordered, vectors if in_order else np.ascontiguousarray(vectors[order])


def checked_queries(queries: Vectors, k: int, dim: int) -> Vectors:
    """Queries [q, dim] as FAISS wants them. FeatureMismatch: another width, not finite; ValueError: k < 1."""
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise FeatureMismatch(f"queries of shape {queries.shape} do not fit an index of width {dim}", dim=dim)
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if not bool(np.isfinite(queries).all()):
        raise FeatureMismatch("a query vector is not finite")
    return queries


def best(scores: Vectors, positions: Positions, k: int) -> tuple[Vectors, Positions]:
    """The k best of every row [q, m]: by score, then by position. Padding is position NO_ITEM with score -inf."""
    if len(scores) == 1:  # plain indexing takes half the time
        first = np.lexsort((positions[0], -scores[0]))[:k]
        return scores[:, first], positions[:, first]
    order = np.lexsort((positions, -scores), axis=-1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(positions, order, 1)


class ExactStore:
    """``ids`` ascending and the ``IndexFlatIP`` that holds their vectors, in that order."""

    def __init__(self, ids: Ids, flat: Any) -> None:
        """ReleaseCorrupt when the ids are not distinct, ascending and one for each vector."""
        self.ids = ids
        self.flat = flat
        #: Vectors held, and the width of one.
        self.ntotal, self.dim = int(flat.ntotal), int(flat.d)
        self._longest: float | None = None
        self._remembered: tuple[Ids, Allowed] | None = None
        if len(ids) != flat.ntotal or (len(ids) > 1 and not bool((np.diff(ids) > 0).all())):
            raise ReleaseCorrupt("the index's ids are not distinct, ascending and one for each vector")

    @property
    def rows(self) -> Vectors:
        """All vectors [ntotal, dim] as a view of the store's memory (or of the mapped file)."""
        if not self.ntotal:
            return np.empty((0, self.dim), dtype=np.float32)
        view: Vectors = native.rev_swig_ptr(self.flat.get_xb(), self.ntotal * self.dim).reshape(self.ntotal, self.dim)
        return view

    @property
    def longest(self) -> float:
        """The largest norm of a vector; read once, when first asked for."""
        if self._longest is None:
            blocks = (self.rows[start : start + 65_536] for start in range(0, self.ntotal, 65_536))
            self._longest = max((float(np.einsum("nd,nd->n", b, b).max()) ** 0.5 for b in blocks), default=0.0)
        return self._longest

    def allowed(self, exclude: Ids | None) -> Allowed:
        """Everything but ``exclude``; ids that are not held do no harm.

        The last read-only array is remembered: a service leaves the same items out of one search after another, and
        finding a hundred thousand of them takes longer than the search.
        """
        if exclude is None or len(exclude) == 0 or self.ntotal == 0:
            return Allowed(None, self.ntotal)
        remembered = self._remembered
        if remembered is not None and remembered[0] is exclude:
            return remembered[1]
        found = self._allowed(np.sort(np.asarray(exclude, dtype=np.int64)))  # in order it is found three times as fast
        if isinstance(exclude, np.ndarray) and not exclude.flags.writeable:
            self._remembered = (exclude, found)
        return found

    def _allowed(self, wanted: Ids) -> Allowed:
        positions = np.minimum(np.searchsorted(self.ids, wanted), self.ntotal - 1)
        mask = np.ones(self.ntotal, dtype=bool)
        mask[positions[self.ids[positions] == wanted]] = False
        count = int(mask.sum())
        return Allowed(None if count == self.ntotal else mask, count)

    def scores(self, queries: Vectors, positions: Positions) -> Vectors:
        """Exact inner products [q, m] of each query with its own ``positions`` [q, m]; -inf at NO_ITEM.

        The same kernel as exhaustive search uses for single queries, so the same number to the bit.
        """
        queries, positions = np.ascontiguousarray(queries), np.ascontiguousarray(positions)
        out = np.empty(positions.shape, dtype=np.float32)
        padded = bool(positions.size) and int(positions.min()) < 0
        asked = np.maximum(positions, 0) if padded else positions
        if positions.size:
            self.flat.compute_distance_subset(
                len(queries), native.swig_ptr(queries), positions.shape[1], native.swig_ptr(out),
                native.swig_ptr(asked),
            )  # fmt: skip
        if padded:
            out[positions == NO_ITEM] = -np.inf
        return out

    def exact(self, queries: Vectors, k: int, allowed: Allowed, scores: Vectors, positions: Positions) -> None:
        """Exhaustive search: fill the first min(k, allowed) columns of ``scores`` and ``positions`` [q, k]."""
        k = min(k, allowed.count)
        selector = allowed.selector()
        if not k:
            return
        for start in range(0, len(queries), QUERIES_PER_CALL):
            rows = slice(start, start + QUERIES_PER_CALL)
            found, places = self._exhaustive(queries[rows], k, allowed.count, selector)
            scores[rows, :k], positions[rows, :k] = best(found, places, k)

    def _exhaustive(self, queries: Vectors, k: int, available: int, selector: Any) -> tuple[Vectors, Positions]:
        """At least the k best; looks further while a tie at the last place could hide a smaller id."""
        parameters = native.SearchParameters(sel=selector) if selector is not None else None
        depth = min(available, k + SLACK)
        while True:
            found, places = self.flat.search(queries, depth, params=parameters)
            if depth == available or not bool((found[:, -1] >= found[:, k - 1]).any()):
                return found, places
            depth = min(available, 2 * depth)

    def named(self, positions: Positions) -> Ids:
        """Ids of positions; NO_ITEM stays."""
        if not self.ntotal:
            return np.full(positions.shape, NO_ITEM, dtype=np.int64)
        if positions.size and int(positions.min()) >= 0:
            named: Ids = self.ids[positions]
            return named
        return np.where(positions == NO_ITEM, NO_ITEM, self.ids[np.maximum(positions, 0)])

    def vectors(self, ids: Ids) -> Vectors:
        """The vectors [n, d] of ``ids`` [n], in their order. KeyError names an id that is not held."""
        wanted = np.asarray(ids, dtype=np.int64)
        positions = np.minimum(np.searchsorted(self.ids, wanted), max(self.ntotal - 1, 0))
        unknown = wanted[self.ids[positions] != wanted] if self.ntotal else wanted
        if len(unknown):
            raise KeyError(f"item {unknown[0]} is not in the index")
        found: Vectors = self.flat.reconstruct_batch(positions) if len(wanted) else np.empty((0, self.dim), np.float32)
        return found


def unanswered(queries: int, k: int) -> tuple[Vectors, Positions]:
    """Scores -inf and positions NO_ITEM [queries, k], to be filled."""
    return np.full((queries, k), -np.inf, dtype=np.float32), np.full((queries, k), NO_ITEM, dtype=np.int64)
