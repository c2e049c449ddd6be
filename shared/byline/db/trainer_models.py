"""Tables of what operators ask of a trainer, and of which release each worker serves for each model.

Why it exists: a request must outlive the trainer that is killed while it serves it, and "which release answers" is a
fact per worker *and* model. Beside ``byline.db.models`` because that file is full.
"""

from __future__ import annotations

import uuid
from datetime import datetime

from sqlalchemy import ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from byline.db.models import NOW, Base


class RefreshRequestRow(Base):
    """An operator's wish for a refresh (written by the gateway), and what became of it (written by the trainer).

    ``handled_at`` NULL: waiting, or the trainer that took it was killed, and the next one takes it again.
    """

    __tablename__ = "refresh_requests"
    __table_args__ = (
        Index("ix_refresh_requests_waiting", "model_id", "requested_at", postgresql_where=text("handled_at IS NULL")),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    requested_at: Mapped[datetime] = mapped_column(server_default=NOW)
    principal: Mapped[str]
    reason: Mapped[str] = mapped_column(server_default="")
    handled_at: Mapped[datetime | None]
    release_id: Mapped[str | None]
    error: Mapped[str | None]


class WorkerReleaseRow(Base):
    """What one worker serves for one model (written by the worker): the fleet view behind ``releases status``.

    ``loading`` is the release it is just loading, ``error`` why it could not; ``since`` is when any of the three last
    changed. Goes with its worker's report.
    """

    __tablename__ = "worker_releases"

    worker_id: Mapped[str] = mapped_column(
        ForeignKey("worker_reports.worker_id", ondelete="CASCADE"), primary_key=True
    )
    model_id: Mapped[str] = mapped_column(primary_key=True)
    release_id: Mapped[str | None]
    loading: Mapped[str | None]
    error: Mapped[str | None]
    since: Mapped[datetime] = mapped_column(server_default=NOW)
