"""Exact search by an engine that rounds differently: candidates from it, scores and proof from the exact store.

Why it exists: a matrix product (many queries at once, or a GPU) reads the vectors once for the whole batch, but its
rounding depends on the batch and the device. So it only proposes a few more than k candidates; those are scored by the
exact store, and the result is taken only if no other item *can* belong to it: every other item scored at most the last
candidate's rounded score, plus the rounding error. Where that does not hold (ties, a crowd at the k-th place) the query
is searched exhaustively. Every engine therefore gives the same answer, to the bit.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from byline.index.exact_store import Allowed, ExactStore, best
from byline.index.protocol import NO_ITEM, Positions, Vectors

#: Rounding of a float32 inner product is at most this many times sqrt(d) * unit * |q| |x|: the error is a walk of d
#: steps of half a unit each, so 8 is far beyond its spread; the bound that cannot be broken, d, is never approached.
_ROUNDING = 8.0
#: Candidates beyond k, at least: enough that the rounding error fits between the k-th and the last.
_MARGIN = 32


class Scan(Protocol):
    """Proposes the best positions by rounded scores."""

    @property
    def max_depth(self) -> int:
        """Largest ``depth`` it takes."""

    @property
    def filters(self) -> bool:
        """Whether ``top`` heeds ``mask``."""

    @property
    def unit(self) -> float:
        """Relative rounding error of one multiplication or addition, 2^-24 for float32."""

    def top(self, queries: Vectors, depth: int, mask: NDArray[np.bool_] | None) -> tuple[Vectors, Positions]:
        """Scores [q, depth] in any order and positions [q, depth]: the best of all (of ``mask`` [n], if it filters)."""


class MatrixScan:
    """Matrix products over blocks of vectors on the CPU."""

    max_depth = 4096
    filters = True
    unit = 2.0**-24
    #: Vectors multiplied at a time: with 64 queries 4 MB of scores, which stay in the cache.
    block = 16_384
    #: Queries multiplied at a time.
    queries = 64

    def __init__(self, rows: Vectors) -> None:
        """``rows`` [n, d], not copied."""
        self._rows = rows

    def top(self, queries: Vectors, depth: int, mask: NDArray[np.bool_] | None) -> tuple[Vectors, Positions]:
        """See ``Scan``."""
        parts = [self._top(queries[s : s + self.queries], depth, mask) for s in range(0, len(queries), self.queries)]
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def _top(self, queries: Vectors, depth: int, mask: NDArray[np.bool_] | None) -> tuple[Vectors, Positions]:
        """Keeps the best so far; of each further block only what beats the worst of them is looked at."""
        count = len(queries)
        scores = np.full((count, depth), -np.inf, dtype=np.float32)
        positions = np.full((count, depth), NO_ITEM, dtype=np.int64)
        for start in range(0, len(self._rows), self.block):
            product = queries @ self._rows[start : start + self.block].T  # [q, block]
            if mask is not None:
                product[:, ~mask[start : start + self.block]] = -np.inf
            better = product > scores.min(axis=1)[:, None]
            for row in range(count):
                places = np.flatnonzero(better[row])
                if not len(places):
                    continue
                joined = np.concatenate([scores[row], product[row, places]])
                named = np.concatenate([positions[row], places + start])
                kept = np.argpartition(-joined, depth - 1)[:depth]
                scores[row], positions[row] = joined[kept], named[kept]
        return scores, positions


def exact_by_scan(
    store: ExactStore, scan: Scan, queries: Vectors, k: int, allowed: Allowed, scores: Vectors, positions: Positions
) -> None:
    """Fill ``scores`` and ``positions`` [q, k] with what ``store.exact`` would, by way of ``scan``. allowed > k."""
    removed = 0 if scan.filters else store.ntotal - allowed.count
    depth = min(allowed.count, k + max(_MARGIN, k // 4)) + removed
    if depth > scan.max_depth:
        store.exact(queries, k, allowed, scores, positions)
        return
    rounded, found = scan.top(queries, depth, allowed.mask if scan.filters else None)
    error = _ROUNDING * store.dim**0.5 * scan.unit * np.linalg.norm(queries, axis=1) * store.longest
    # What was not proposed scored at most ``last``; nothing was left out where everything was proposed.
    whole = depth >= allowed.count + removed
    last = np.full(len(queries), -np.inf) if whole else rounded.min(axis=1) + error
    if removed and allowed.mask is not None:
        found = np.where(allowed.mask[np.maximum(found, 0)], found, NO_ITEM)
    order = np.sort(found, axis=1)  # ascending positions read the (mapped) vectors in order
    exact, places = best(store.scores(queries, order), order, k)
    proven = exact[:, -1] > last
    scores[proven], positions[proven] = exact[proven], places[proven]
    for row in np.flatnonzero(~proven):
        store.exact(queries[row : row + 1], k, allowed, scores[row : row + 1], positions[row : row + 1])
