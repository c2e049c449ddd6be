"""Corpora, models and items in Postgres; withdrawal.

Why it exists: a withdrawal is a promise (no answer given after its acknowledgement names the item), so it
is one committed fact that every answer consults (``withdrawn``), not a property of some index file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, func, insert, select, text, update
from sqlalchemy.dialects.postgresql import insert as pg_insert

from byline.catalog.items import Item
from byline.db.listen import WITHDRAWALS
from byline.db.models import Base
from byline.db.session import transaction
from byline.errors import ModelNotFound, ModelNotUsable

_corpora = Base.metadata.tables["corpora"]
_models = Base.metadata.tables["models"]
_items = Base.metadata.tables["items"]
_WITHDRAWN_AMONG = text(
    "SELECT item_id FROM items WHERE item_id = ANY(CAST(:ids AS bigint[])) AND withdrawn_at IS NOT NULL"
)
_audit = Base.metadata.tables["audit_events"]
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
class WithdrawalReceipt:
    """What a withdrawal did. From ``at`` on (the database's clock) no answer names ``withdrawn`` or ``already``."""

    at: datetime
    withdrawn: tuple[int, ...]
    already: tuple[int, ...]
    unknown: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Insertion:
    """Outcome of adding items: ids that are new, and ids another corpus or another image holds already."""

    added: frozenset[int]
    conflicting: frozenset[int]


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
            return [_to_item(row) for row in connection.execute(query).mappings()]

    def by_ids(self, item_ids: Iterable[int]) -> dict[int, Item]:
        """The items with these ids (withdrawn ones included); unknown ids are left out."""
        wanted = list(dict.fromkeys(int(i) for i in item_ids))
        found: dict[int, Item] = {}
        with transaction(self._engine) as connection:
            for chunk in _chunks(wanted):
                for row in connection.execute(select(_items).where(_items.c.item_id.in_(chunk))).mappings():
                    found[row["item_id"]] = _to_item(row)
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

    def add_items(self, corpus_id: str, items: Sequence[Item]) -> Insertion:
        """Insert the items that are new, in one transaction; what exists is never changed."""
        if not items:
            return Insertion(frozenset(), frozenset())
        with transaction(self._engine) as connection:
            statement = pg_insert(_items).on_conflict_do_nothing(index_elements=["item_id"])
            values = [_to_row(corpus_id, item) for item in items]
            added = frozenset(connection.execute(statement.returning(_items.c.item_id), values).scalars())
        refused = [item for item in items if item.item_id not in added]
        known = self.known(corpus_id, [item.item_id for item in refused])
        conflicting = frozenset(i.item_id for i in refused if known.get(i.item_id) != i.image_sha256)
        return Insertion(added, conflicting)

    # -- withdrawal -----------------------------------------------------------------------------

    def withdraw(
        self, item_ids: Iterable[int], principal: str = "local", request_id: str | None = None
    ) -> WithdrawalReceipt:
        """Withdraw items for good; when this returns, ``withdrawn`` names them for everybody.

        Items withdrawn before and unknown ids are reported, not refused, so the call may be repeated.
        """
        wanted = sorted({int(i) for i in item_ids})
        with transaction(self._engine) as connection:
            at: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
            rows = [row for chunk in _chunks(wanted) for row in _locked(connection, chunk)]
            fresh = [row.item_id for row in rows if row.withdrawn_at is None]
            for chunk in _chunks(fresh):
                connection.execute(update(_items).where(_items.c.item_id.in_(chunk)).values(withdrawn_at=at))
            for corpus_id in sorted({row.corpus_id for row in rows}):
                ids = [str(row.item_id) for row in rows if row.corpus_id == corpus_id]
                connection.execute(
                    insert(_audit).values(
                        at=at, principal=principal, action="WithdrawItems", resource=f"corpora/{corpus_id}",
                        request_id=request_id, decision="ALLOWED", detail={"item_ids": ids},
                    )
                )  # fmt: skip
                connection.execute(select(func.pg_notify(WITHDRAWALS, corpus_id)))
        known = {row.item_id for row in rows}
        return WithdrawalReceipt(
            at=at,
            withdrawn=tuple(fresh),
            already=tuple(row.item_id for row in rows if row.withdrawn_at is not None),
            unknown=tuple(i for i in wanted if i not in known),
        )

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


def _locked(connection: Connection, chunk: Sequence[int]) -> Sequence[Any]:
    """Lock the items in id order, so that two withdrawals never wait for each other."""
    columns = select(_items.c.item_id, _items.c.corpus_id, _items.c.withdrawn_at)
    return connection.execute(
        columns.where(_items.c.item_id.in_(chunk)).order_by(_items.c.item_id).with_for_update()
    ).all()


def _chunks(values: Sequence[int]) -> Iterable[Sequence[int]]:
    return (values[start : start + _BATCH] for start in range(0, len(values), _BATCH))


def _to_model(row: Mapping[Any, Any]) -> ModelRecord:
    return ModelRecord(row["id"], row["corpus_id"], Path(row["directory"]), row["revision"])


def _to_item(row: Mapping[Any, Any]) -> Item:
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
