"""What was added to a corpus since a release was built, embedded by that release's head: rows in Postgres.

Why it exists: a release never changes, and a new item must be findable within seconds. So every release may have a
delta: additions, in the order of a sequence that only grows. Additions to one delta come one after another (the row
of the delta is locked), so "everything up to sequence n" is the same set for whoever reads it, and an answer that
names release and sequence can be explained later. The next release contains the items and starts without a delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine, Table, func, select, text, update
from sqlalchemy.dialects.postgresql import insert as pg_insert

from byline.catalog.items import Item
from byline.catalog.store import to_item
from byline.db.corpus_models import ReleaseDeltaItemRow, ReleaseDeltaRow
from byline.db.listen import DELTAS
from byline.db.models import Base
from byline.db.session import transaction
from byline.errors import FeatureMismatch

_deltas: Table = ReleaseDeltaRow.metadata.tables["release_deltas"]
_rows: Table = ReleaseDeltaItemRow.metadata.tables["release_delta_items"]
_items = Base.metadata.tables["items"]
_DROP = text(
    "DELETE FROM release_deltas WHERE release_id IN (SELECT id FROM releases WHERE collected_at IS NOT NULL)"
)


@dataclass(frozen=True)
class DeltaState:
    """How far a release's delta is. ``corpus_sequence``: the last addition to the corpus that release and delta hold
    completely; -1 before anybody looked."""

    release_id: str
    sequence: int = 0
    corpus_sequence: int = -1
    items: int = 0


@dataclass(frozen=True)
class DeltaRows:
    """Items of a delta and their embeddings [d], in one order."""

    items: tuple[Item, ...] = ()
    embeddings: tuple[NDArray[np.float32], ...] = ()


class DeltaStore:
    """The tables ``release_deltas`` and ``release_delta_items``. Every method is one transaction."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def state(self, release_id: str) -> DeltaState:
        """How far the delta is; its first state if there is none yet."""
        count = select(func.count()).where(_rows.c.release_id == release_id).scalar_subquery()
        query = select(_deltas.c.sequence, _deltas.c.corpus_sequence, count).where(_deltas.c.release_id == release_id)
        with transaction(self._engine) as connection:
            row = connection.execute(query).one_or_none()
        return DeltaState(release_id) if row is None else DeltaState(release_id, *row)

    def ids(self, release_id: str) -> frozenset[int]:
        """The items in a release's delta."""
        query = select(_rows.c.item_id).where(_rows.c.release_id == release_id)
        with transaction(self._engine) as connection:
            return frozenset(connection.execute(query).scalars())

    def add(
        self, release_id: str, item_ids: Sequence[int], embeddings: NDArray[np.float32], corpus_sequence: int = -1
    ) -> DeltaState:
        """Add items [n] with their embeddings [n, d], and say that all additions up to ``corpus_sequence`` are in.

        Items that are in already stay as they are. FeatureMismatch for embeddings of another number or not finite.
        """
        vectors = np.ascontiguousarray(embeddings, dtype="<f4")
        if vectors.ndim != 2 or len(vectors) != len(item_ids) or not bool(np.isfinite(vectors).all()):
            raise FeatureMismatch(f"embeddings of shape {vectors.shape} for {len(item_ids)} items, or not finite")
        with transaction(self._engine) as connection:
            connection.execute(pg_insert(_deltas).values(release_id=release_id).on_conflict_do_nothing())
            locked = select(_deltas).where(_deltas.c.release_id == release_id).with_for_update()
            known = connection.execute(locked).one()
            sequence, covered = known.sequence + 1, max(known.corpus_sequence, corpus_sequence)
            if item_ids:
                common = {"release_id": release_id, "sequence": sequence}
                values = [
                    {**common, "item_id": int(item_id), "embedding": row.tobytes()}
                    for item_id, row in zip(item_ids, vectors, strict=True)
                ]
                connection.execute(pg_insert(_rows).on_conflict_do_nothing(), values)
            connection.execute(
                update(_deltas).where(_deltas.c.release_id == release_id)
                .values(sequence=sequence, corpus_sequence=covered, updated_at=func.now())
            )  # fmt: skip
            connection.execute(select(func.pg_notify(DELTAS, release_id)))
        return self.state(release_id)

    def since(self, release_id: str, sequence: int) -> tuple[DeltaState, DeltaRows]:
        """The state now, and what came after ``sequence``, in order. Withdrawn items are left out."""
        state = self.state(release_id)
        query = (
            select(_rows.c.embedding, _items)
            .join(_items, _items.c.item_id == _rows.c.item_id)
            .where(_rows.c.release_id == release_id, _rows.c.sequence > sequence, _rows.c.sequence <= state.sequence)
            .where(_items.c.withdrawn_at.is_(None))
            .order_by(_rows.c.sequence, _rows.c.item_id)
        )
        if state.sequence == sequence:
            return state, DeltaRows()
        with transaction(self._engine) as connection:
            rows = connection.execute(query).mappings().all()
        return state, DeltaRows(
            tuple(to_item(row) for row in rows), tuple(np.frombuffer(row["embedding"], dtype="<f4") for row in rows)
        )

    def drop_collected(self) -> int:
        """Remove the deltas of releases whose files are gone; how many there were."""
        with transaction(self._engine) as connection:
            return connection.execute(_DROP).rowcount
