"""Two answers of one search, made one: the index of a release, and the few items added since it was built.

Why it exists: an index is immutable and a corpus is not. The additions are few, so they are searched exactly beside
it; this is all there is to merging the two.
"""

from __future__ import annotations

import numpy as np

from byline.index.protocol import NO_ITEM, Ids, Vectors


def merge_best(one: tuple[Vectors, Ids], other: tuple[Vectors, Ids], k: int) -> tuple[Vectors, Ids]:
    """The k best of two answers to the same queries: scores [q, k] descending and ids [q, k], ties by id, ascending.

    Rows are padded with NO_ITEM and -inf as those of an index are. The two must not hold the same item.
    """
    scores = np.concatenate([one[0], other[0]], axis=1)
    ids = np.concatenate([one[1], other[1]], axis=1)
    # Padding last among equals: its id is the smallest there is.
    order = np.lexsort((ids, ids == NO_ITEM, -scores))[:, :k]
    best, named = np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)
    short = k - best.shape[1]
    if short > 0:
        best = np.pad(best, ((0, 0), (0, short)), constant_values=-np.inf)
        named = np.pad(named, ((0, 0), (0, short)), constant_values=NO_ITEM)
    return best, named
