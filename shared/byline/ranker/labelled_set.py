"""The training data of a head: features of queries and items, and the teacher's τ between them.

Why it exists: curation scores different candidates for different queries (or the whole corpus for all), and the
head, the losses and the metrics all want one dense matrix. "Not scored" is NaN here and nowhere a zero, because
τ = 0 is a legitimate value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from byline.errors import LabelsNotUsable

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LabelledSet:
    """Queries and items with the influence the teacher gave them.

    ``query_features`` [q, in], ``item_ids`` [n], ``item_features`` [n, in], ``tau`` [q, n] with NaN where the
    teacher did not score the item, ``standard_error`` [q, n] or None.
    """

    query_features: FloatArray
    item_ids: IntArray
    item_features: FloatArray
    tau: FloatArray
    standard_error: FloatArray | None = None

    def __post_init__(self) -> None:
        q, n = self.tau.shape if self.tau.ndim == 2 else (-1, -1)
        if self.query_features.ndim != 2 or self.item_features.ndim != 2 or q < 0:
            raise LabelsNotUsable("query features, item features and tau must be matrices")
        if self.query_features.shape[0] != q or self.item_features.shape[0] != n or self.item_ids.shape != (n,):
            raise LabelsNotUsable(f"tau is {self.tau.shape}, but there are {self.query_features.shape[0]} query rows, "
                                  f"{self.item_features.shape[0]} item rows and {self.item_ids.shape[0]} item ids")
        if self.query_features.shape[1] != self.item_features.shape[1]:
            raise LabelsNotUsable("queries and items have features of different widths")
        if self.standard_error is not None and self.standard_error.shape != self.tau.shape:
            raise LabelsNotUsable("tau and its standard error have different shapes")

    @property
    def queries(self) -> int:
        """Number of queries q."""
        return int(self.tau.shape[0])

    @property
    def items(self) -> int:
        """Number of items n."""
        return int(self.tau.shape[1])

    @property
    def in_dim(self) -> int:
        """Width of a feature row."""
        return int(self.item_features.shape[1])

    def scored(self) -> npt.NDArray[np.bool_]:
        """[q, n]: True where the teacher gave a value."""
        return ~np.isnan(self.tau)


def influence_ranks(tau: FloatArray) -> IntArray:
    """Rank of every item for every query, 0 = most influential, -1 = not scored.

    ``tau`` [q, n] with NaN for "not scored"; ties are broken by position, so the order is strict and repeatable.
    """
    q, n = tau.shape
    order = np.argsort(np.where(np.isnan(tau), np.inf, -tau), axis=1, kind="stable")
    ranks = np.empty((q, n), dtype=np.int64)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(n, dtype=np.int64), (q, n)), axis=1)
    ranks[np.isnan(tau)] = -1
    return ranks


def dense_tau(item_ids: IntArray, scored_ids: list[IntArray], values: list[FloatArray]) -> FloatArray:
    """Spread per-query values over all items: [q, n] with NaN where ``scored_ids[i]`` lacks the item.

    Ids that are no longer in ``item_ids`` (withdrawn items) are left out.
    """
    order = np.argsort(item_ids, kind="stable")
    sorted_ids = item_ids[order]
    out = np.full((len(scored_ids), item_ids.shape[0]), np.nan, dtype=np.float32)
    if item_ids.shape[0] == 0:
        return out
    for row, (ids, tau) in enumerate(zip(scored_ids, values, strict=True)):
        at = np.minimum(np.searchsorted(sorted_ids, ids), sorted_ids.shape[0] - 1)
        known = sorted_ids[at] == ids
        out[row, order[at[known]]] = tau[known]
    return out
