"""Operators' requests for a refresh: asked through the gateway, answered by the trainer.

Why it exists: the trainer is another process on another machine, and may be killed while it serves a request. So a
request is a row that waits until its outcome is written beside it; a trainer that died leaves it to the next one.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, func, insert, select, update

from byline.db.models import Base
from byline.db.session import transaction
from byline.errors import BylineError

_requests = Base.metadata.tables["refresh_requests"]


class RefreshRequestNotFound(BylineError):
    """No refresh was asked for under this id."""

    reason = "REFRESH_REQUEST_NOT_FOUND"
    code = "NOT_FOUND"


@dataclass(frozen=True, slots=True)
class RefreshRequest:
    """One request. ``handled_at`` None: it waits, or is being served; then one of ``release_id`` and ``error``."""

    request_id: uuid.UUID
    model_id: str
    requested_at: datetime
    principal: str
    reason: str
    handled_at: datetime | None
    release_id: str | None
    error: str | None


class RefreshRequests:
    """The table ``refresh_requests``. Every method is one transaction."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def ask(self, model_id: str, request_id: uuid.UUID, principal: str, reason: str = "") -> RefreshRequest:
        """Ask for a refresh of a registered model. Asking while another request waits returns that one."""
        with transaction(self._engine) as connection:
            waiting = _waiting(connection, model_id)
            if waiting:
                return waiting[0]
            row = {"id": request_id, "model_id": model_id, "principal": principal, "reason": reason}
            made = connection.execute(insert(_requests).values(row).returning(*_requests.c)).mappings().one()
            return _to_request(made)

    def get(self, request_id: uuid.UUID) -> RefreshRequest:
        """One request. RefreshRequestNotFound."""
        with transaction(self._engine) as connection:
            row = connection.execute(select(_requests).where(_requests.c.id == request_id)).mappings().one_or_none()
        if row is None:
            raise RefreshRequestNotFound(f"no refresh was asked for as {request_id}", request_id=request_id)
        return _to_request(row)

    def waiting(self, model_id: str) -> Sequence[RefreshRequest]:
        """Requests without an outcome, oldest first."""
        with transaction(self._engine) as connection:
            return _waiting(connection, model_id)

    def answer(self, request_ids: Sequence[uuid.UUID], *, release_id: str | None = None, error: str | None = None
               ) -> None:
        """Write what became of requests: the candidate's id, or why there is none."""
        if not request_ids:
            return
        with transaction(self._engine) as connection:
            connection.execute(
                update(_requests)
                .where(_requests.c.id.in_(request_ids), _requests.c.handled_at.is_(None))
                .values(handled_at=func.now(), release_id=release_id, error=error)
            )


def _waiting(connection: Any, model_id: str) -> list[RefreshRequest]:
    query = select(_requests).where(_requests.c.model_id == model_id, _requests.c.handled_at.is_(None))
    return [_to_request(row) for row in connection.execute(query.order_by(_requests.c.requested_at)).mappings()]


def _to_request(row: Any) -> RefreshRequest:
    return RefreshRequest(
        row["id"], row["model_id"], row["requested_at"], row["principal"], row["reason"], row["handled_at"],
        row["release_id"], row["error"],
    )  # fmt: skip
