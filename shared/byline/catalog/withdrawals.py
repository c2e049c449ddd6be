"""Withdrawals as facts: which items, on whose word, since when, and the receipt that says so for ever.

Why it exists: a creator who opted out may ask years later what was done. The receipt is written in the transaction
that takes the items out of every answer; what the next release removed from which files is added to it when that
happens (``byline.releases.purge``), and can be checked against the files at any time. A withdrawal by creator or
licence stands: what fits it and is added later is refused.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Table, func, insert, select, text, update

from byline.catalog.items import Item
from byline.db.corpus_models import WithdrawalItemRow, WithdrawalRow
from byline.db.listen import WITHDRAWALS
from byline.db.models import Base
from byline.errors import InvalidRequest, ReceiptNotFound

_corpora = Base.metadata.tables["corpora"]
_items = Base.metadata.tables["items"]
_audit = Base.metadata.tables["audit_events"]
_withdrawals: Table = WithdrawalRow.metadata.tables["withdrawals"]
_withdrawn: Table = WithdrawalItemRow.metadata.tables["withdrawal_items"]
_STANDING = text(
    "SELECT criterion FROM withdrawals WHERE corpus_id = :corpus AND (criterion ? 'creator' OR criterion ? 'licence')"
)
_REOPEN = text("""
UPDATE withdrawals SET purged_at = NULL WHERE corpus_id = :corpus AND purged_at IS NOT NULL
    AND id IN (SELECT withdrawal_id FROM withdrawal_items WHERE item_id = ANY(:ids))
""")
_BATCH = 10_000


@dataclass(frozen=True, slots=True)
class Criterion:
    """What a withdrawal is asked for: ids, or all of a creator's, or all under a licence (exactly one of them)."""

    item_ids: tuple[int, ...] = ()
    creator: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        """InvalidRequest unless exactly one is given."""
        if sum((bool(self.item_ids), bool(self.creator), bool(self.licence))) != 1:
            raise InvalidRequest("criterion", "withdraw by item ids, or by creator, or by licence: give exactly one")

    def to_json(self) -> dict[str, Any]:
        """As kept in the receipt. Ids are strings there: JSON has no 64-bit integer."""
        if self.item_ids:
            return {"items": [str(item_id) for item_id in self.item_ids]}
        return {"creator": self.creator} if self.creator else {"licence": self.licence}


@dataclass(frozen=True, slots=True)
class WithdrawalReceipt:
    """What a withdrawal did. From ``at`` on (the database's clock) no answer names ``withdrawn`` or ``already``.

    ``receipts`` are the ids under which it is kept, one for each corpus the items are of.
    """

    at: datetime
    withdrawn: tuple[int, ...]
    already: tuple[int, ...]
    unknown: tuple[int, ...]
    receipts: tuple[uuid.UUID, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredReceipt:
    """A receipt as it is read back. ``images`` maps each item to the digest of its image; ``purged`` says what was
    removed from where, once ``purged_at`` is set."""

    receipt_id: uuid.UUID
    corpus_id: str
    at: datetime
    principal: str
    criterion: Mapping[str, Any]
    reason: str
    purged_at: datetime | None
    purged: Mapping[str, Any]
    images: Mapping[int, str] = field(default_factory=dict)
    already: frozenset[int] = frozenset()


def withdraw(
    connection: Connection, wanted: Sequence[int], *, principal: str, request_id: str | None, reason: str
) -> WithdrawalReceipt:
    """Withdraw items by id, of whatever corpora, in the caller's transaction."""
    rows = [row for chunk in _chunks(wanted) for row in _locked(connection, _items.c.item_id.in_(chunk))]
    at: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
    receipts = []
    for corpus_id in sorted({row.corpus_id for row in rows}):
        own = [row for row in rows if row.corpus_id == corpus_id]
        criterion = Criterion(tuple(row.item_id for row in own))
        receipts.append(_record(connection, corpus_id, own, at, criterion, principal, request_id, reason))
    known = {row.item_id for row in rows}
    return _receipt(at, rows, tuple(i for i in wanted if i not in known), receipts)


def withdraw_matching(
    connection: Connection, corpus_id: str, criterion: Criterion, *, principal: str, request_id: str | None, reason: str
) -> WithdrawalReceipt:
    """Withdraw all items of a creator or under a licence, and refuse what is added under it from now on."""
    # An addition that is under way holds this row: it is seen here, or it will see this withdrawal.
    connection.execute(select(_corpora.c.id).where(_corpora.c.id == corpus_id).with_for_update())
    column, value = (
        (_items.c.creator, criterion.creator) if criterion.creator else (_items.c.licence, criterion.licence)
    )
    rows = _locked(connection, (_items.c.corpus_id == corpus_id) & (column == value))
    at: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
    receipt_id = _record(connection, corpus_id, rows, at, criterion, principal, request_id, reason)
    return _receipt(at, rows, (), [receipt_id])


def refusals(connection: Connection, corpus_id: str, items: Sequence[Item]) -> dict[int, str]:
    """Which of these items may not be added because their image, creator or licence was withdrawn: id to reason."""
    digests = [item.image_sha256 for item in items]
    gone = select(_items.c.image_sha256).where(
        _items.c.corpus_id == corpus_id, _items.c.withdrawn_at.is_not(None), _items.c.image_sha256.in_(digests)
    )
    images = set(connection.execute(gone).scalars())
    creators: set[str] = set()
    licences: set[str] = set()
    for (criterion,) in connection.execute(_STANDING, {"corpus": corpus_id}):
        creators.update(filter(None, [criterion.get("creator")]))
        licences.update(filter(None, [criterion.get("licence")]))
    refused: dict[int, str] = {}
    for item in items:
        if item.image_sha256 and item.image_sha256 in images:
            refused[item.item_id] = "this image was withdrawn from the corpus"
        elif item.creator in creators:
            refused[item.item_id] = f"creator {item.creator} has withdrawn from this corpus"
        elif item.licence in licences:
            refused[item.item_id] = f"items under {item.licence} were withdrawn from this corpus"
    return refused


def stored_receipt(connection: Connection, receipt_id: uuid.UUID) -> StoredReceipt:
    """One receipt. ReceiptNotFound."""
    row = connection.execute(select(_withdrawals).where(_withdrawals.c.id == receipt_id)).mappings().one_or_none()
    if row is None:
        raise ReceiptNotFound(f"no withdrawal has the receipt {receipt_id}", receipt=receipt_id)
    items = connection.execute(select(_withdrawn).where(_withdrawn.c.withdrawal_id == receipt_id)).all()
    return _stored(row, items)


def receipts(connection: Connection, corpus_id: str, only_unpurged: bool = False) -> list[StoredReceipt]:
    """The receipts of a corpus, newest first, without their items."""
    query = select(_withdrawals).where(_withdrawals.c.corpus_id == corpus_id).order_by(_withdrawals.c.at.desc())
    if only_unpurged:
        query = query.where(_withdrawals.c.purged_at.is_(None))
    return [_stored(row, ()) for row in connection.execute(query).mappings()]


def mark_purged(
    connection: Connection, receipt_ids: Sequence[uuid.UUID], purged: Mapping[str, Any]
) -> None:
    """Note on receipts what was removed. A receipt that was marked before keeps its first time."""
    connection.execute(
        update(_withdrawals).where(_withdrawals.c.id.in_(receipt_ids))
        .values(purged=dict(purged), purged_at=func.coalesce(_withdrawals.c.purged_at, func.clock_timestamp()))
    )  # fmt: skip


def lock_receipts(connection: Connection, corpus_id: str) -> None:
    """Keep others from closing or opening receipts of a corpus until the caller's transaction ends."""
    lock = text("SELECT pg_advisory_xact_lock(hashtextextended(:key, 0))")
    connection.execute(lock, {"key": f"receipts:{corpus_id}"})


def purged_items(connection: Connection, corpus_id: str) -> frozenset[int]:
    """The items that closed receipts say are gone."""
    query = (
        select(_withdrawn.c.item_id)
        .join(_withdrawals, _withdrawals.c.id == _withdrawn.c.withdrawal_id)
        .where(_withdrawals.c.corpus_id == corpus_id, _withdrawals.c.purged_at.is_not(None))
    )
    return frozenset(connection.execute(query).scalars())


def reopen_receipts(connection: Connection, corpus_id: str, item_ids: Sequence[int]) -> int:
    """These items are in a file after all: their receipts count as not purged until a purge has removed them again.

    Returns how many were closed.
    """
    return connection.execute(_REOPEN, {"corpus": corpus_id, "ids": [int(item_id) for item_id in item_ids]}).rowcount


def _record(
    connection: Connection, corpus_id: str, rows: Sequence[Any], at: datetime, criterion: Criterion, principal: str,
    request_id: str | None, reason: str,
) -> uuid.UUID:  # fmt: skip
    fresh = [row.item_id for row in rows if row.withdrawn_at is None]
    for chunk in _chunks(fresh):
        connection.execute(update(_items).where(_items.c.item_id.in_(chunk)).values(withdrawn_at=at))
    receipt_id: uuid.UUID = connection.execute(select(func.gen_random_uuid())).scalar_one()
    connection.execute(
        insert(_withdrawals).values(
            id=receipt_id, corpus_id=corpus_id, at=at, principal=principal, request_id=request_id,
            criterion=criterion.to_json(), reason=reason,
        )
    )  # fmt: skip
    for chunk in _chunks(rows):
        connection.execute(
            insert(_withdrawn),
            [{"withdrawal_id": receipt_id, "item_id": row.item_id, "image_sha256": row.image_sha256,
              "already": row.withdrawn_at is not None} for row in chunk],
        )  # fmt: skip
    detail = {"withdrawn": [str(row.item_id) for row in rows], "receipt": str(receipt_id)}
    connection.execute(
        insert(_audit).values(
            at=at, principal=principal, action="WithdrawItems", resource=f"corpora/{corpus_id}",
            request_id=request_id, decision="ALLOWED", detail=detail,
        )
    )  # fmt: skip
    connection.execute(select(func.pg_notify(WITHDRAWALS, corpus_id)))
    return receipt_id


def _locked(connection: Connection, condition: ColumnElement[bool]) -> Sequence[Any]:
    """Lock the items in id order, so that two withdrawals never wait for each other."""
    columns = select(_items.c.item_id, _items.c.corpus_id, _items.c.withdrawn_at, _items.c.image_sha256)
    return connection.execute(columns.where(condition).order_by(_items.c.item_id).with_for_update()).all()


def _receipt(
    at: datetime, rows: Sequence[Any], unknown: tuple[int, ...], receipt_ids: Sequence[uuid.UUID]
) -> WithdrawalReceipt:
    return WithdrawalReceipt(
        at=at,
        withdrawn=tuple(row.item_id for row in rows if row.withdrawn_at is None),
        already=tuple(row.item_id for row in rows if row.withdrawn_at is not None),
        unknown=unknown,
        receipts=tuple(receipt_ids),
    )


def _stored(row: Mapping[Any, Any], items: Sequence[Any]) -> StoredReceipt:
    return StoredReceipt(
        receipt_id=row["id"], corpus_id=row["corpus_id"], at=row["at"], principal=row["principal"],
        criterion=row["criterion"], reason=row["reason"], purged_at=row["purged_at"], purged=row["purged"],
        images={item.item_id: item.image_sha256 for item in items},
        already=frozenset(item.item_id for item in items if item.already),
    )  # fmt: skip


def _chunks(values: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (values[start : start + _BATCH] for start in range(0, len(values), _BATCH))
