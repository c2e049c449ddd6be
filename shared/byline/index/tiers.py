"""The approximate tiers: SQ8 (every code is looked at), IVF over SQ8 or RaBitQ codes (some lists are), HNSW (links).

Why it exists: which is best depends on the size of the corpus and on its vectors; ``choice`` measures. All of them
answer with exact scores (see ``refined``). What each does under a filter is said at its ``_candidates``.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, ClassVar, Self

import faiss
import numpy as np
from numpy.typing import NDArray

from byline.errors import ReleaseCorrupt
from byline.index.exact_store import Allowed, checked_rows, native, unanswered
from byline.index.files import with_ids
from byline.index.protocol import NO_ITEM, Ids, IndexStats, Positions, Vectors
from byline.index.refined import RefinedIndex, require_parts

#: Seed of every k-means and every rotation here.
_SEED = 1234
_KMEANS_ROUNDS = 10
#: Training vectors for each list: beyond this k-means gets slower and hardly better.
_POINTS_PER_LIST = 40
_LEAST_TRAINING_ROWS = 131_072
_CONSTRUCTION = 80
#: With a smaller share of allowed items around a query, an exhaustive scan over the allowed is safer, and soon cheaper.
LEAST_SHARE = 1 / 4


def _refined(dim: int, factory: str) -> Any:
    return native.index_factory(dim, f"{factory},RFlat", faiss.METRIC_INNER_PRODUCT)


class SQ8Index(RefinedIndex):
    """One byte for each dimension, all of them scanned: a quarter of the bandwidth of exact search."""

    kind: ClassVar[str] = "IndexScalarQuantizer"

    @classmethod
    def build(cls, ids: Ids, vectors: Vectors) -> Self:
        """See ``VectorIndex.build``; twice as many candidates as answers."""
        begun = time.perf_counter()
        ids, vectors = checked_rows(ids, vectors)
        index = _refined(vectors.shape[1], "SQ8")
        index.k_factor = 2
        return cls._filled(with_ids(index), ids, vectors, begun)

    @property
    def factory(self) -> str:
        """``SQ8,RFlat``."""
        return "SQ8,RFlat"

    @property
    def code_bytes(self) -> float:
        """A byte for each dimension."""
        return float(self._base.code_size)

    @property
    def effort(self) -> dict[str, float]:
        """``k_factor``."""
        return {"k_factor": self.k_factor}

    def with_effort(self, effort: dict[str, float]) -> None:
        """See ``RefinedIndex.with_effort``."""
        native.downcast_index(self._index.index).k_factor = self.k_factor = effort["k_factor"]

    def _candidates(
        self, queries: Vectors, depth: int, allowed: Allowed, selector: Any
    ) -> tuple[Vectors, Positions]:
        """Every allowed code is looked at, so a filter costs no recall."""
        parameters = native.SearchParameters(sel=selector) if selector is not None else None
        rough, found = self._base.search(queries, depth, params=parameters)
        return rough, found


class HNSWIndex(RefinedIndex):
    """A graph over the exact vectors: the fastest at high recall, the dearest to build and in memory."""

    kind: ClassVar[str] = "IndexHNSWFlat"

    @classmethod
    def _parts(cls, inner: Any) -> tuple[Any, Any]:
        if type(inner).__name__ != cls.kind:
            return super()._parts(inner)  # which refuses it
        return inner, native.downcast_index(inner.storage)

    @classmethod
    def build(cls, ids: Ids, vectors: Vectors, links: int = 32) -> Self:
        """See ``VectorIndex.build``; ``links`` of every node in every layer but the lowest, which has twice as many."""
        begun = time.perf_counter()
        ids, vectors = checked_rows(ids, vectors)
        index = native.index_factory(vectors.shape[1], f"HNSW{links},Flat", faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _CONSTRUCTION
        index.hnsw.efSearch = 256
        return cls._filled(with_ids(index), ids, vectors, begun)

    @property
    def factory(self) -> str:
        """Such as ``HNSW32,Flat``."""
        return f"HNSW{self._base.hnsw.nb_neighbors(1)},Flat"

    @property
    def code_bytes(self) -> float:
        """The vectors, the links of the lowest layer (4 bytes each) and the offsets to them."""
        return float(4 * self.dim + 4 * self._base.hnsw.nb_neighbors(0) + 12)

    @property
    def stats(self) -> IndexStats:
        """What it costs: the vectors are part of what is searched, and stand in the file once."""
        found = super().stats
        return replace(found, stored_bytes_per_item=found.bytes_per_item)

    @property
    def effort(self) -> dict[str, float]:
        """``efSearch``, the candidates kept on the way."""
        return {"efSearch": float(self._base.hnsw.efSearch)}

    def with_effort(self, effort: dict[str, float]) -> None:
        """See ``RefinedIndex.with_effort``."""
        self._base.hnsw.efSearch = int(effort["efSearch"])

    def _candidates(
        self, queries: Vectors, depth: int, allowed: Allowed, selector: Any
    ) -> tuple[Vectors, Positions]:
        """Under a filter the walk is not told of it: the share of allowed items among those it ends with says how much
        further it has to go (twice as far down the ranking, and wider, for half of them). Where less than
        ``LEAST_SHARE`` is allowed, or an eighth of the graph would be walked, the row stays empty, and the caller
        searches exhaustively."""
        wanted = max(int(self._base.hnsw.efSearch), depth)
        rough, found = self._walk(queries, wanted)
        if allowed.mask is None:
            return rough[:, :depth], found[:, :depth]
        scores, positions = unanswered(len(queries), depth)
        for row in range(len(queries)):
            kept = _allowed_of(found[row], allowed.mask)
            share = max(float(kept.mean()), 1e-9)
            width = int(wanted / share**2)
            if share < LEAST_SHARE or width > max(self.ntotal // 8, wanted):
                continue
            near, places = rough[row], found[row]
            if width > wanted * 1.05:
                near, places = (side[0] for side in self._walk(queries[row : row + 1], width))
                kept = _allowed_of(places, allowed.mask)
            count = min(depth, int(kept.sum()))
            scores[row, :count], positions[row, :count] = near[kept][:count], places[kept][:count]
        return scores, positions

    def _walk(self, queries: Vectors, width: int) -> tuple[Vectors, Positions]:
        rough, found = self._base.search(queries, width, params=native.SearchParametersHNSW(efSearch=width))
        return rough, found


class IVFIndex(RefinedIndex):
    """Lists of codes around centroids, of which only the nearest are looked at."""

    kind: ClassVar[str] = "IndexIVFScalarQuantizer"
    code: ClassVar[str] = "SQ8"

    def __init__(self, index: Any, ids: Ids, build_seconds: float | None = None) -> None:
        """See ``RefinedIndex``."""
        super().__init__(index, ids, build_seconds)
        lists = self._base.invlists
        self._sizes = np.array([lists.list_size(n) for n in range(self._base.nlist)], dtype=np.int64)
        self._list_of: Positions | None = None
        self._last_kept: tuple[NDArray[np.bool_], Positions] | None = None
        self._set(self._base.nprobe)

    @classmethod
    def build(cls, ids: Ids, vectors: Vectors, lists: int | None = None) -> Self:
        """See ``VectorIndex.build``; ``lists`` None: ``default_lists``. Seeded, so the same vectors give the same."""
        begun = time.perf_counter()
        ids, vectors = checked_rows(ids, vectors)
        index = cls._empty(vectors.shape[1], lists or default_lists(len(ids)))
        base, _ = cls._parts(index)
        base.cp.seed, base.cp.niter, base.cp.spherical = _SEED, _KMEANS_ROUNDS, True
        base.cp.min_points_per_centroid, base.cp.max_points_per_centroid = 1, _POINTS_PER_LIST
        base.nprobe = max(1, base.nlist // 16)
        return cls._filled(with_ids(index), ids, vectors, begun)

    @classmethod
    def _empty(cls, dim: int, lists: int) -> Any:
        index = _refined(dim, f"IVF{lists},{cls.code}")
        index.k_factor = 2
        return index

    @staticmethod
    def _parameters(**given: Any) -> Any:
        return native.SearchParametersIVF(**given)

    @property
    def factory(self) -> str:
        """Such as ``IVF512,SQ8,RFlat``."""
        return f"IVF{self._base.nlist},{self.code},RFlat"

    @property
    def code_bytes(self) -> float:
        """The code, 8 bytes for its place, and a share of the centroids."""
        return float(self._base.code_size + 8 + 4 * self.dim * self._base.nlist / max(self.ntotal, 1))

    @property
    def effort(self) -> dict[str, float]:
        """``nprobe`` lists are looked at; ``k_factor`` candidates for each answer are scored exactly."""
        return {"nprobe": float(self._base.nprobe), "k_factor": self.k_factor}

    def with_effort(self, effort: dict[str, float]) -> None:
        """See ``RefinedIndex.with_effort``."""
        self._set(min(int(effort["nprobe"]), self._base.nlist))
        native.downcast_index(self._index.index).k_factor = self.k_factor = effort.get("k_factor", self.k_factor)

    def _set(self, probes: int) -> None:
        """Look at ``probes`` lists; what every search without a filter needs is made here, once."""
        self._base.nprobe = probes
        self._usual = self.ntotal * probes // self._base.nlist
        self._plain = self._parameters(nprobe=probes)

    def _candidates(
        self, queries: Vectors, depth: int, allowed: Allowed, selector: Any
    ) -> tuple[Vectors, Positions]:
        """``nprobe`` lists, or as many more as it takes: what is allowed in them must be as much as ``nprobe`` lists
        hold on average, and four times ``depth``. Where the filter bites around the query, the answers lie further
        down the ranking, and more must be seen to find them all: that much again, by the share that is allowed in
        the usual lists. Below ``LEAST_SHARE`` the row stays empty, and the caller searches exhaustively."""
        usual = self._usual
        if allowed.mask is None and usual >= 4 * depth:
            rough, found = self._base.search(queries, depth, params=self._plain)
            return rough, found
        kept = self._sizes if allowed.mask is None else self._kept(allowed.mask)
        scores, positions = unanswered(len(queries), depth)
        _, nearest = self._base.quantizer.search(queries, self._base.nlist)
        for row in range(len(queries)):
            seen = np.cumsum(kept[nearest[row]])  # allowed items in the nearest 1, 2, … lists
            share = seen[self._base.nprobe - 1] / max(self._sizes[nearest[row, : self._base.nprobe]].sum(), 1)
            if share < LEAST_SHARE:
                continue
            lists = 1 + int(np.searchsorted(seen, max(usual / share**2, 4 * depth)))
            lists = min(max(lists, self._base.nprobe), self._base.nlist)
            rough, found = self._base.search(
                queries[row : row + 1], depth, params=self._parameters(nprobe=lists, sel=selector)
            )
            scores[row], positions[row] = rough[0], found[0]
        return scores, positions

    def _kept(self, mask: NDArray[np.bool_]) -> Positions:
        """Allowed items of every list [nlist]: all, less the forbidden ones, which are few as a rule. The last mask's
        are remembered; the store hands out the same mask for the same read-only ids, and nobody writes to it."""
        remembered = self._last_kept
        if remembered is not None and remembered[0] is mask:
            return remembered[1]
        if self._list_of is None:
            places = np.empty(self.ntotal, dtype=np.int64)
            for number, size in enumerate(self._sizes):
                if size:
                    pointer = self._base.invlists.get_ids(number)
                    places[native.rev_swig_ptr(pointer, int(size))] = number
            self._list_of = places
        kept: Positions = self._sizes - np.bincount(self._list_of[~mask], minlength=len(self._sizes))
        self._last_kept = (mask, kept)
        return kept


class IVFRaBitQIndex(IVFIndex):
    """One bit for each dimension and two factors: the smallest; many more candidates are then scored exactly.

    The vectors are turned by a random rotation first, without which a bit of a dimension that hardly varies is wasted.
    """

    kind: ClassVar[str] = "IndexIVFRaBitQ"
    code: ClassVar[str] = "RaBitQ"

    def __init__(self, index: Any, ids: Ids, build_seconds: float | None = None) -> None:
        """See ``RefinedIndex``."""
        super().__init__(index, ids, build_seconds)
        turned = native.downcast_index(native.downcast_index(index.index).base_index)
        self._rotation = native.downcast_VectorTransform(turned.chain.at(0))

    @classmethod
    def _parts(cls, inner: Any) -> tuple[Any, Any]:
        turned = native.downcast_index(inner.base_index) if isinstance(inner, native.IndexRefine) else inner
        if not isinstance(turned, native.IndexPreTransform) or turned.chain.size() != 1:
            raise ReleaseCorrupt(f"the file holds a {type(turned).__name__}, not a rotated {cls.kind}")
        base, flat = native.downcast_index(turned.index), native.downcast_index(inner.refine_index)
        require_parts(cls.kind, base, flat)
        return base, flat

    @classmethod
    def _empty(cls, dim: int, lists: int) -> Any:
        index = _refined(dim, f"RR{dim},IVF{lists},{cls.code}")
        index.k_factor = 8
        return index

    @classmethod
    def _training_rows(cls, vectors: Vectors) -> Vectors:
        """As many as k-means can use: all of them would be turned first, in a copy."""
        enough = max(_POINTS_PER_LIST * default_lists(len(vectors)), _LEAST_TRAINING_ROWS)
        if len(vectors) <= enough:
            return vectors
        return vectors[np.sort(np.random.default_rng(_SEED).permutation(len(vectors))[:enough])]

    @property
    def factory(self) -> str:
        """Such as ``RR768,IVF512,RaBitQ,RFlat``."""
        return f"RR{self.dim},{super().factory}"

    @staticmethod
    def _parameters(**given: Any) -> Any:
        return native.IVFRaBitQSearchParameters(qb=4, **given)

    def _candidates(
        self, queries: Vectors, depth: int, allowed: Allowed, selector: Any
    ) -> tuple[Vectors, Positions]:
        """As in every IVF; a query is turned by itself, because a matrix product rounds by the batch."""
        if len(queries) == 1:
            return super()._candidates(self._rotation.apply(queries), depth, allowed, selector)
        turned = np.concatenate([self._rotation.apply(queries[row : row + 1]) for row in range(len(queries))])
        return super()._candidates(turned, depth, allowed, selector)


def _allowed_of(positions: Positions, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which of ``positions`` are items that ``mask`` allows."""
    kept: NDArray[np.bool_] = (positions != NO_ITEM) & mask[np.maximum(positions, 0)]
    return kept


def default_lists(items: int) -> int:
    """Lists for so many items: a power of two near twice the square root, 16 at least."""
    return int(max(16, 2 ** round(np.log2(2 * max(items, 1) ** 0.5))))
