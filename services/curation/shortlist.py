"""Which items are ranked for a query: nearest by raw features, nearest by the active head, and some of all others.

Why it exists: raw features find what any head may overlook, a head what it has learnt, and the random sample from
outside both measures what they miss together (``byline.drift.measure.pruning``). Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
_NONE: Ids = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Shortlist:
    """Ids to rank, ascending, and where they came from.

    ``nearest`` and ``by_head`` may share items; ``explored`` is a uniform sample of the ``outside`` items in neither.
    ``release_id``: whose head it was, None without one.
    """

    item_ids: Ids
    nearest: Ids = field(default_factory=lambda: _NONE)
    by_head: Ids = field(default_factory=lambda: _NONE)
    explored: Ids = field(default_factory=lambda: _NONE)
    outside: int = 0
    release_id: str | None = None


def choose_shortlist(
    query_features: NDArray[np.float32],
    item_ids: Ids,
    item_features: NDArray[np.float32],
    *,
    count: int,
    explore_share: float,
    seed: int,
    direct: slice | None = None,
    head_scores: NDArray[np.float32] | None = None,
    release_id: str | None = None,
) -> Shortlist:
    """``count`` items: of the two orders the first ones of each, and a random share from *outside* both.

    ``query_features`` [d], ``item_features`` [n, d], ``head_scores`` [n] (None: no head yet). Nearest by raw features
    is by the inner product of the columns ``direct``, where there are such: they estimate influence by themselves.
    Else by cosine, standardised per dimension first: otherwise one block of features decides alone. Ties by item id.
    """
    if count >= len(item_ids):
        every = np.sort(item_ids)
        return Shortlist(every, every, _NONE, _NONE, 0, release_id)
    explored = min(round(count * explore_share), len(item_ids) - count)
    by_raw = _places(item_ids, _nearness(query_features, item_features, direct))
    by_head = by_raw if head_scores is None else _places(item_ids, head_scores)
    # An item is inside by the better of its two places: both lists are equally long, and overlap as they like.
    best = np.minimum(by_raw, by_head)
    order = np.lexsort((item_ids, by_raw, best))
    inside, rest = order[: count - explored], order[count - explored :]
    length = int(best[inside].max()) + 1 if len(inside) else 0
    random = np.random.default_rng(seed).choice(rest, size=explored, replace=False)
    return Shortlist(
        np.sort(item_ids[np.concatenate([inside, random])]),
        np.sort(item_ids[inside[by_raw[inside] < length]]),
        _NONE if head_scores is None else np.sort(item_ids[inside[by_head[inside] < length]]),
        np.sort(item_ids[random]),
        len(rest),
        release_id,
    )


def _nearness(query: NDArray[np.float32], items: NDArray[np.float32], direct: slice | None) -> NDArray[np.float32]:
    if direct is not None:
        return np.asarray(items[:, direct] @ query[direct])
    mean, deviation = items.mean(0), items.std(0) + 1e-6
    rows, row = (items - mean) / deviation, (query - mean) / deviation
    return np.asarray(rows @ row / (np.linalg.norm(rows, axis=1) * np.linalg.norm(row) + 1e-9))


def _places(item_ids: Ids, scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """[n]: the place of each item in the order of ``scores``, from 0."""
    places = np.empty(len(item_ids), dtype=np.int64)
    places[np.lexsort((item_ids, -scores))] = np.arange(len(item_ids))
    return places
