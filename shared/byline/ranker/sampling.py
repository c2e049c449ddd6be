"""Which pairs a training step looks at.

Why it exists: encoding is the cost of a step, so a step draws a few queries and a few items, encodes each distinct
row once and uses every pair between them. Items the teacher did not score for a query serve, a small share of them,
as examples of "not influential": without those the head never sees what pruning left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from byline.ranker.labelled_set import IntArray


@dataclass(frozen=True)
class PairBatch:
    """Rows to encode and what the teacher says of their pairs.

    ``queries`` [b] and ``items`` [m] index the labelled set; ``ranks`` [b, m] (0 = most influential), ``totals`` [b],
    ``mask`` [b, m] True where the pair takes part.
    """

    queries: IntArray
    items: IntArray
    ranks: IntArray
    totals: IntArray
    mask: npt.NDArray[np.bool_]


class PairSampler:
    """Draws batches for ever, every query once per pass over the queries, from its own seeded generator."""

    def __init__(self, ranks: IntArray, *, queries_per_step: int, items_per_step: int, outside_share: float,
                 rng: np.random.Generator) -> None:
        """``ranks`` [q, n] from :func:`influence_ranks`, −1 = not scored."""
        self._ranks = ranks
        self._scored = ranks >= 0
        self._totals = self._scored.sum(1)
        self._eligible = np.flatnonzero(self._totals > 0)
        self._per_step = max(1, min(queries_per_step, self._eligible.shape[0]))
        self._items_per_step = max(2, min(items_per_step, ranks.shape[1]))
        self._outside_share = outside_share
        self._rng = rng
        self._pending: IntArray = np.empty(0, dtype=np.int64)

    @property
    def steps_per_pass(self) -> int:
        """Steps in which every query with labels is seen once."""
        return int(np.ceil(self._eligible.shape[0] / self._per_step))

    def draw(self) -> PairBatch:
        """The next batch."""
        queries = self._next_queries()
        scored = self._scored[queries]
        popularity = scored.mean(0)
        outside = popularity.max() * self._outside_share
        keys = np.log(np.maximum(popularity, outside) + 1e-12) + self._rng.gumbel(size=popularity.shape)
        items = np.sort(np.argpartition(-keys, self._items_per_step - 1)[: self._items_per_step])
        ranks = self._ranks[np.ix_(queries, items)].copy()
        totals = self._totals[queries]
        mask = ranks >= 0
        unscored = ~mask
        if unscored.any() and self._outside_share > 0:
            wanted = mask.sum(1) * self._outside_share / (1.0 - self._outside_share)
            probability = np.minimum(1.0, wanted / np.maximum(unscored.sum(1), 1))
            mask = mask | (unscored & (self._rng.random(unscored.shape) < probability[:, None]))
        ranks = np.where(unscored, totals[:, None], ranks)
        return PairBatch(queries, items, ranks, totals, mask)

    def _next_queries(self) -> IntArray:
        while self._pending.shape[0] < self._per_step:
            self._pending = np.concatenate([self._pending, self._rng.permutation(self._eligible)])
        chosen, self._pending = self._pending[: self._per_step], self._pending[self._per_step :]
        return np.unique(chosen)
