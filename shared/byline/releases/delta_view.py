"""A delta as a worker searches it: a snapshot in memory, extended when the delta has grown.

Why it exists: a lookup takes milliseconds and cannot read a thousand embeddings each time; and all of one answer must
come from one state of the delta. Apart from the rows (``delta``), which the gateway uses too and without FAISS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from byline.catalog.items import Item
from byline.index.flat import FlatIndex
from byline.releases.delta import DeltaState, DeltaStore


@dataclass(frozen=True)
class Delta:
    """A snapshot of a delta, to search. ``index`` is None while it is empty. Immutable."""

    state: DeltaState
    index: FlatIndex | None = None
    catalogue: Mapping[int, Item] = field(default_factory=dict)


def extended(known: Delta, store: DeltaStore) -> Delta:
    """The delta as it is now, reading only what ``known`` lacks."""
    state, rows = store.since(known.state.release_id, known.state.sequence)
    if state == known.state:
        return known
    if not rows.items:
        return Delta(state, known.index, known.catalogue)
    ids = np.array([item.item_id for item in rows.items], dtype=np.int64)
    vectors = np.stack(rows.embeddings)
    if known.index is not None:
        before = known.index.ids
        ids, vectors = np.append(before, ids), np.concatenate([known.index.vectors(before), vectors])
    catalogue = dict(known.catalogue) | {item.item_id: item for item in rows.items}
    return Delta(state, FlatIndex.build(ids, vectors), catalogue)


class Deltas:
    """The deltas of the releases a worker answers from, read again when told, and at least every ``keep_s`` seconds.

    One for each model: ``releases`` are the one that answers, the one before, and one that a job is pinned to. For one
    thread at a time, but for ``changed``. Late by a notification means an item found a moment later.
    """

    def __init__(
        self, store: DeltaStore, clock: Callable[[], float], keep_s: float = 2.0, releases: int = 3
    ) -> None:
        self._store = store
        self._clock = clock
        self._keep_s = keep_s
        self._releases = releases
        self._version = 0
        self._known: dict[str, tuple[int, float, Delta]] = {}

    def changed(self) -> None:
        """A delta grew, or may have. Any thread."""
        self._version += 1

    def of(self, release_id: str) -> Delta:
        """The delta of a release: one snapshot for the whole of an answer."""
        version, known = self._version, self._known.pop(release_id, None)
        if known is None or known[0] != version or self._clock() >= known[1]:
            delta = extended(Delta(DeltaState(release_id)) if known is None else known[2], self._store)
            known = (version, self._clock() + self._keep_s, delta)
        self._known[release_id] = known  # last used last
        while len(self._known) > self._releases:
            del self._known[next(iter(self._known))]
        return known[2]
