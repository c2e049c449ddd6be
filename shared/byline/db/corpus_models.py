"""Tables of a corpus that changes: what was added to a release since it was built, and what was withdrawn.

Why it exists: an item must be findable within seconds of being added, and a withdrawal must be provable years later;
neither fits a release, which never changes. Written by ``byline.releases.delta`` and ``byline.catalog`` only.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from byline.db.models import NOW, Base


class ReleaseDeltaRow(Base):
    """How far a release's delta is: ``sequence`` counts its changes, ``corpus_sequence`` is the last addition to the
    corpus that it, with the release, holds completely."""

    __tablename__ = "release_deltas"

    release_id: Mapped[str] = mapped_column(ForeignKey("releases.id", ondelete="CASCADE"), primary_key=True)
    sequence: Mapped[int] = mapped_column(BigInteger, server_default="0")
    corpus_sequence: Mapped[int] = mapped_column(BigInteger, server_default="-1")
    updated_at: Mapped[datetime] = mapped_column(server_default=NOW)


class ReleaseDeltaItemRow(Base):
    """An item added after the release was built, embedded by the release's head: little-endian float32 [d]."""

    __tablename__ = "release_delta_items"
    __table_args__ = (Index("ix_release_delta_items_release_id_sequence", "release_id", "sequence"),)

    release_id: Mapped[str] = mapped_column(
        ForeignKey("release_deltas.release_id", ondelete="CASCADE"), primary_key=True
    )
    item_id: Mapped[int] = mapped_column(BigInteger, ForeignKey("items.item_id"), primary_key=True, autoincrement=False)
    sequence: Mapped[int] = mapped_column(BigInteger)
    embedding: Mapped[bytes]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)


class WithdrawalRow(Base):
    """The receipt of one withdrawal. ``criterion`` holds one of ``items``, ``creator``, ``licence``; the latter two
    stand: what is added later and fits is refused. ``purged`` says what was removed from which files."""

    __tablename__ = "withdrawals"
    __table_args__ = (Index("ix_withdrawals_corpus_id_at", "corpus_id", "at"),)

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    corpus_id: Mapped[str] = mapped_column(ForeignKey("corpora.id"))
    at: Mapped[datetime]
    principal: Mapped[str]
    request_id: Mapped[str | None]
    criterion: Mapped[dict[str, Any]]
    reason: Mapped[str] = mapped_column(server_default="")
    purged_at: Mapped[datetime | None]
    purged: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'::jsonb"))


class WithdrawalItemRow(Base):
    """An item that a receipt names. ``image_sha256`` stays so that its absence from the blobs can be checked."""

    __tablename__ = "withdrawal_items"
    __table_args__ = (Index("ix_withdrawal_items_item_id", "item_id"),)

    withdrawal_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("withdrawals.id"), primary_key=True)
    item_id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    image_sha256: Mapped[str]
    already: Mapped[bool] = mapped_column(server_default=text("false"))
