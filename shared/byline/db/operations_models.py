"""Tables of what operators ask for.

Why it exists: an operator's wish must outlive the gateway that took it and reach a worker on another machine, so it is
a row. Beside ``byline.db.models`` because that file is full.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy.orm import Mapped, mapped_column

from byline.db.models import NOW, Base


class WorkerDrainRow(Base):
    """A worker that is to take no new work (written by the gateway); no row means that it works.

    ``worker`` is its id without the child's process id: a child that is replaced meanwhile stays drained.
    ``drained_at`` is set by the worker once it holds nothing.
    """

    __tablename__ = "worker_drains"

    worker: Mapped[str] = mapped_column(primary_key=True)
    asked_at: Mapped[datetime] = mapped_column(server_default=NOW)
    reason: Mapped[str] = mapped_column(server_default="")
    drained_at: Mapped[datetime | None]
