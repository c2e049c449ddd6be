"""Corpora, models and items in Postgres; withdrawal.

Why it exists: a withdrawal is a promise (no answer given after its acknowledgement names the item), so it
is one committed fact that every answer consults (``withdrawn``), not a property of some index file.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, func, select, text, update
from sqlalchemy.dialects.postgresql import insert as pg_insert

from byline.catalog import copies, withdrawals
from byline.catalog.items import Item
from byline.catalog.look import Look
from byline.catalog.withdrawals import Criterion, StoredReceipt, WithdrawalReceipt
from byline.db.listen import ADDITIONS
from byline.db.models import Base
from byline.db.session import transaction
from byline.errors import ModelNotFound, ModelNotUsable

_corpora = Base.metadata.tables["corpora"]
_models = Base.metadata.tables["models"]
_items = Base.metadata.tables["items"]
_WITHDRAWN_AMONG = text(
    "SELECT item_id FROM items WHERE item_id = ANY(CAST(:ids AS bigint[])) AND withdrawn_at IS NOT NULL"
)
_BATCH = 10_000


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A text-to-image model whose outputs are attributed, and the corpus it learnt from."""

    model_id: str
    corpus_id: str
    directory: Path
    revision: str


@dataclass(frozen=True, slots=True)
class CorpusSummary:
    """A corpus in figures."""

    corpus_id: str
    items: int
    withdrawn: int
    creators: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Insertion:
    """Outcome of adding items: ids that are new, and ids another corpus or another image holds already.

    ``refused`` are withdrawn, with the reason. ``sequence`` is the corpus' after it: an answer that names it, or a
    later one, has looked at all that was added. ``groups`` are those of the new items.
    """

    added: frozenset[int]
    conflicting: frozenset[int]
    refused: Mapping[int, str] = field(default_factory=dict)
    sequence: int = 0
    groups: Mapping[int, int] = field(default_factory=dict)


class CatalogStore:
    """The ``corpora``, ``models`` and ``items`` tables. Every method is one transaction."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # -- corpora and models ---------------------------------------------------------------------

    def add_corpus(self, corpus_id: str) -> None:
        """Make sure the corpus exists."""
        with transaction(self._engine) as connection:
            connection.execute(pg_insert(_corpora).values(id=corpus_id).on_conflict_do_nothing())

    def corpora(self) -> list[CorpusSummary]:
        """All corpora with their figures, by id."""
        count = func.count(_items.c.item_id)
        query = (
            select(
                _corpora.c.id, count, count.filter(_items.c.withdrawn_at.is_not(None)),
                func.count(_items.c.creator.distinct()), _corpora.c.created_at,
            )
            .outerjoin(_items, _items.c.corpus_id == _corpora.c.id)
            .group_by(_corpora.c.id)
            .order_by(_corpora.c.id)
        )  # fmt: skip
        with transaction(self._engine) as connection:
            return [CorpusSummary(*row) for row in connection.execute(query)]

    def add_model(self, model: ModelRecord) -> None:
        """Register a model, or move a known one to another directory.

        ModelNotUsable when the id is known with another corpus or revision: its labels and releases would
        silently belong to something else. Register the new revision under a new id.
        """
        with transaction(self._engine) as connection:
            connection.execute(pg_insert(_corpora).values(id=model.corpus_id).on_conflict_do_nothing())
            values = {"corpus_id": model.corpus_id, "directory": str(model.directory), "revision": model.revision}
            connection.execute(pg_insert(_models).values(id=model.model_id, **values).on_conflict_do_nothing())
            row = connection.execute(
                select(_models).where(_models.c.id == model.model_id).with_for_update()
            ).mappings().one()  # fmt: skip
            if (row["corpus_id"], row["revision"]) != (model.corpus_id, model.revision):
                raise ModelNotUsable(
                    f"model {model.model_id} is registered with corpus {row['corpus_id']} and revision "
                    f"{row['revision']}, not {model.corpus_id} and {model.revision}; use another model id",
                    model_id=model.model_id,
                )
            connection.execute(update(_models).where(_models.c.id == model.model_id).values(values))

    def model(self, model_id: str) -> ModelRecord:
        """One model. ModelNotFound."""
        with transaction(self._engine) as connection:
            return self.model_within(connection, model_id)

    @staticmethod
    def model_within(connection: Connection, model_id: str) -> ModelRecord:
        """As ``model``, inside the caller's transaction."""
        row = connection.execute(select(_models).where(_models.c.id == model_id)).mappings().one_or_none()
        if row is None:
            raise ModelNotFound(f"no model is registered as {model_id}", model_id=model_id)
        return _to_model(row)

    def models(self) -> list[ModelRecord]:
        """All models, by id."""
        with transaction(self._engine) as connection:
            return [_to_model(row) for row in connection.execute(select(_models).order_by(_models.c.id)).mappings()]

    # -- items ----------------------------------------------------------------------------------

    def items(self, corpus_id: str, include_withdrawn: bool = False) -> list[Item]:
        """All items of a corpus, by id."""
        query = select(_items).where(_items.c.corpus_id == corpus_id).order_by(_items.c.item_id)
        if not include_withdrawn:
            query = query.where(_items.c.withdrawn_at.is_(None))
        with transaction(self._engine) as connection:
            return [to_item(row) for row in connection.execute(query).mappings()]

    def size(self, corpus_id: str) -> int:
        """How many items the corpus has ever had, withdrawn ones included."""
        query = select(func.count()).select_from(_items).where(_items.c.corpus_id == corpus_id)
        with transaction(self._engine) as connection:
            return int(connection.execute(query).scalar_one())

    def by_ids(self, item_ids: Iterable[int]) -> dict[int, Item]:
        """The items with these ids (withdrawn ones included); unknown ids are left out."""
        wanted = list(dict.fromkeys(int(i) for i in item_ids))
        found: dict[int, Item] = {}
        with transaction(self._engine) as connection:
            for chunk in _chunks(wanted):
                for row in connection.execute(select(_items).where(_items.c.item_id.in_(chunk))).mappings():
                    found[row["item_id"]] = to_item(row)
        return found

    def known(self, corpus_id: str, item_ids: Sequence[int]) -> dict[int, str | None]:
        """For every id that is taken: its image's digest, or None when it belongs to another corpus."""
        query = select(_items.c.item_id, _items.c.corpus_id, _items.c.image_sha256)
        with transaction(self._engine) as connection:
            rows = [
                row for chunk in _chunks(item_ids)
                for row in connection.execute(query.where(_items.c.item_id.in_(chunk)))
            ]  # fmt: skip
        return {row.item_id: row.image_sha256 if row.corpus_id == corpus_id else None for row in rows}

    def add_items(
        self, corpus_id: str, items: Sequence[Item], looks: Mapping[int, Look] | None = None,
        stated: Collection[int] = (),
    ) -> Insertion:  # fmt: skip
        """Insert the items that are new, in one transaction; what exists is never changed.

        An item whose look (``looks``, by id) is that of a known one joins its near-duplicate group, unless its group
        is ``stated``. What a withdrawal covers, by image, creator or licence, is refused.
        """
        if not items:
            return Insertion(frozenset(), frozenset())
        looks = looks or {}
        with transaction(self._engine) as connection:
            # Additions to a corpus come one after another: whoever sees a sequence sees all items up to it.
            advance = update(_corpora).where(_corpora.c.id == corpus_id).values(sequence=_corpora.c.sequence + 1)
            sequence = connection.execute(advance.returning(_corpora.c.sequence)).scalar_one()
            refused = withdrawals.refusals(connection, corpus_id, items)
            wanted = [item for item in items if item.item_id not in refused]
            groups = copies.groups_of(connection, corpus_id, wanted, looks, stated)
            values = [
                _to_row(corpus_id, item) | _look_row(looks.get(item.item_id))
                | {"near_duplicate_group": groups[item.item_id], "added_sequence": sequence}
                for item in wanted
            ]  # fmt: skip
            statement = pg_insert(_items).on_conflict_do_nothing(index_elements=["item_id"])
            returned = connection.execute(statement.returning(_items.c.item_id), values).scalars() if values else ()
            added = frozenset(returned)
            connection.execute(select(func.pg_notify(ADDITIONS, corpus_id)))
        rest = [item for item in wanted if item.item_id not in added]
        known = self.known(corpus_id, [item.item_id for item in rest])
        conflicting = frozenset(i.item_id for i in rest if known.get(i.item_id) != i.image_sha256)
        return Insertion(added, conflicting, refused, sequence, {i: groups[i] for i in added})

    def refusals(self, corpus_id: str, items: Sequence[Item]) -> dict[int, str]:
        """Which of these items ``add_items`` would refuse as withdrawn, by id with the reason: ask before storing."""
        with transaction(self._engine) as connection:
            return withdrawals.refusals(connection, corpus_id, items)

    def sequence(self, corpus_id: str) -> int:
        """How often items were added to the corpus; 0 for one that is not known."""
        query = select(_corpora.c.sequence).where(_corpora.c.id == corpus_id)
        with transaction(self._engine) as connection:
            return connection.execute(query).scalar() or 0

    def added_since(self, corpus_id: str, sequence: int) -> tuple[int, list[tuple[int, int]]]:
        """The corpus' sequence now, and (sequence, id) of visible items added after ``sequence``, oldest first."""
        query = (
            select(_items.c.added_sequence, _items.c.item_id)
            .where(_items.c.corpus_id == corpus_id, _items.c.added_sequence > sequence, _items.c.withdrawn_at.is_(None))
            .order_by(_items.c.added_sequence, _items.c.item_id)
        )
        with transaction(self._engine) as connection:
            # The sequence is read first: what is committed in between is found again next time.
            now = connection.execute(select(_corpora.c.sequence).where(_corpora.c.id == corpus_id)).scalar() or 0
            return now, [(row.added_sequence, row.item_id) for row in connection.execute(query)]

    # -- withdrawal -----------------------------------------------------------------------------

    def withdraw(
        self, item_ids: Iterable[int], principal: str = "local", request_id: str | None = None, reason: str = ""
    ) -> WithdrawalReceipt:
        """Withdraw items for good; when this returns, ``withdrawn`` names them for everybody.

        Items withdrawn before and unknown ids are reported, not refused, so the call may be repeated.
        """
        wanted = sorted({int(i) for i in item_ids})
        with transaction(self._engine) as connection:
            return withdrawals.withdraw(
                connection, wanted, principal=principal, request_id=request_id, reason=reason
            )

    def withdraw_matching(
        self, corpus_id: str, criterion: Criterion, principal: str = "local", request_id: str | None = None,
        reason: str = "",
    ) -> WithdrawalReceipt:  # fmt: skip
        """Withdraw all items of a creator or under a licence; later ones are refused. As ``withdraw`` otherwise."""
        if criterion.item_ids:
            return self.withdraw(criterion.item_ids, principal, request_id, reason)
        with transaction(self._engine) as connection:
            return withdrawals.withdraw_matching(
                connection, corpus_id, criterion, principal=principal, request_id=request_id, reason=reason
            )

    def receipt(self, receipt_id: uuid.UUID) -> StoredReceipt:
        """One receipt. ReceiptNotFound."""
        with transaction(self._engine) as connection:
            return withdrawals.stored_receipt(connection, receipt_id)

    def receipts(self, corpus_id: str) -> list[StoredReceipt]:
        """The receipts of a corpus, newest first, without their items."""
        with transaction(self._engine) as connection:
            return withdrawals.receipts(connection, corpus_id)

    @staticmethod
    def withdrawn_among(connection: Connection, item_ids: Sequence[int]) -> frozenset[int]:
        """Which of these items are withdrawn, inside the caller's transaction: what one answer needs to know."""
        if not item_ids:
            return frozenset()
        return frozenset(connection.execute(_WITHDRAWN_AMONG, {"ids": list(item_ids)}).scalars())

    def withdrawn(self, corpus_id: str) -> frozenset[int]:
        """Ids of all withdrawn items of a corpus, as committed now. Ask once per answer, never cache."""
        query = select(_items.c.item_id).where(_items.c.corpus_id == corpus_id, _items.c.withdrawn_at.is_not(None))
        with transaction(self._engine) as connection:
            return frozenset(connection.execute(query).scalars())


def _chunks(values: Sequence[int]) -> Iterable[Sequence[int]]:
    return (values[start : start + _BATCH] for start in range(0, len(values), _BATCH))


def _to_model(row: Mapping[Any, Any]) -> ModelRecord:
    return ModelRecord(row["id"], row["corpus_id"], Path(row["directory"]), row["revision"])


def to_item(row: Mapping[Any, Any]) -> Item:
    """A row of ``items`` as the value."""
    return Item(
        item_id=row["item_id"], caption=row["caption"], keywords=tuple(row["keywords"]), creator=row["creator"],
        licence=row["licence"], source=row["source"], source_path=row["source_path"],
        image_sha256=row["image_sha256"], near_duplicate_group=row["near_duplicate_group"],
    )  # fmt: skip


def _to_row(corpus_id: str, item: Item) -> dict[str, Any]:
    return {
        "item_id": item.item_id, "corpus_id": corpus_id, "caption": item.caption, "keywords": list(item.keywords),
        "creator": item.creator, "licence": item.licence, "source": item.source, "source_path": item.source_path,
        "image_sha256": item.image_sha256, "near_duplicate_group": item.near_duplicate_group,
    }  # fmt: skip


def _look_row(look: Look | None) -> dict[str, Any]:
    return {"look_hash": None if look is None else look.hash, "look": None if look is None else look.thumbnail}
