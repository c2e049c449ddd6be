"""ReleaseService: which release each worker serves, and requests for a refresh.

Why it exists: a swap is a fact about a fleet and a refresh the work of another machine, so an operator sees the one and
asks for the other here, through rows that workers and trainer read and write.
"""

# ruff: noqa: N802 - the methods have the names the protos give them.

from __future__ import annotations

import re
import uuid
from typing import Any

from sqlalchemy import text

from attribution.v1 import release_service_pb2 as wire
from attribution.v1 import release_service_pb2_grpc as rpc
from byline.db.session import transaction
from byline.errors import InvalidRequest
from byline.releases.requests import RefreshRequest, RefreshRequestNotFound, RefreshRequests
from byline.security.scopes import current_principal
from services.gateway import convert, names
from services.gateway.context import GatewayContext

#: A worker silent for longer than this is not listed.
_SILENT_S = 300
_FLEET = text("""
SELECT w.worker_id, w.release_id, w.loading, w.error, w.since, r.last_seen
FROM worker_releases w JOIN worker_reports r USING (worker_id)
WHERE w.model_id = :model AND r.last_seen > now() - make_interval(secs => :silent) ORDER BY w.worker_id
""")
_REFRESH = re.compile(r"models/([A-Za-z0-9][A-Za-z0-9._-]{0,127})/releaseRefreshes/([0-9a-fA-F-]{36})")


class ReleaseServicer(rpc.ReleaseServiceServicer):
    """The handlers of ReleaseService."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context
        self._requests = RefreshRequests(context.engine)

    async def GetFleetStatus(self, request: wire.GetFleetStatusRequest, context: Any) -> wire.FleetStatus:
        """What every worker serves for a model."""
        return await self._context.offload(self._fleet, names.parse_model(request.model, "model"))

    async def RefreshRelease(self, request: wire.RefreshReleaseRequest, context: Any) -> wire.ReleaseRefresh:
        """Ask the trainer for a refresh."""
        model_id = names.parse_model(request.model, "model")
        return await self._context.offload(self._ask, model_id, current_principal().name, request.reason[:500])

    async def GetReleaseRefresh(self, request: wire.GetReleaseRefreshRequest, context: Any) -> wire.ReleaseRefresh:
        """What became of a request."""
        model_id, request_id = _parse_refresh(request.name)
        return await self._context.offload(self._get, model_id, request_id)

    def _fleet(self, model_id: str) -> wire.FleetStatus:
        self._context.catalog.model(model_id)  # ModelNotFound
        active = self._context.registry.active(model_id)
        with transaction(self._context.engine) as connection:
            rows = connection.execute(_FLEET, {"model": model_id, "silent": _SILENT_S}).mappings().all()
        wanted = active.release_id if active is not None else None
        workers = [
            wire.WorkerRelease(
                worker_id=row["worker_id"], release=names.release(model_id, row["release_id"] or ""),
                loading_release=names.release(model_id, row["loading"] or ""), error=row["error"] or "",
                since_time=convert.timestamp(row["since"]), last_seen_time=convert.timestamp(row["last_seen"]),
                current=wanted is not None and row["release_id"] == wanted,
            )
            for row in rows
        ]  # fmt: skip
        left = self._context.registry.rolled_back_from(model_id)
        return wire.FleetStatus(active=convert.active_release(active) if active else None, workers=workers,
                                rolled_back_from=names.release(model_id, left or ""))  # fmt: skip

    def _ask(self, model_id: str, principal: str, reason: str) -> wire.ReleaseRefresh:
        self._context.catalog.model(model_id)  # ModelNotFound
        return _message(self._requests.ask(model_id, uuid.uuid4(), principal, reason))

    def _get(self, model_id: str, request_id: uuid.UUID) -> wire.ReleaseRefresh:
        found = self._requests.get(request_id)
        if found.model_id != model_id:
            raise RefreshRequestNotFound(f"model {model_id} has no refresh {request_id}", request_id=request_id)
        return _message(found)


def _parse_refresh(name: str) -> tuple[str, uuid.UUID]:
    found = _REFRESH.fullmatch(name)
    try:
        if found is not None:
            return found[1], uuid.UUID(found[2])
    except ValueError:
        pass
    raise InvalidRequest("name", "must be models/{model}/releaseRefreshes/{refresh}", value=name[:200])


def _message(found: RefreshRequest) -> wire.ReleaseRefresh:
    return wire.ReleaseRefresh(
        name=f"{names.model(found.model_id)}/releaseRefreshes/{found.request_id}", reason=found.reason,
        create_time=convert.timestamp(found.requested_at),
        end_time=None if found.handled_at is None else convert.timestamp(found.handled_at),
        release=names.release(found.model_id, found.release_id or ""), error=found.error or "",
    )  # fmt: skip
