"""The client of those who watch over releases: what each worker serves, and requests for a refresh.

Why it exists: few need these calls, so they stand beside the client that everybody uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import grpc

from attribution.v1 import release_service_pb2 as wire_messages
from attribution.v1 import release_service_pb2_grpc
from byline.client import wire
from byline.client.calls import Call
from byline.client.sync import Client
from byline.client.values import ActiveRelease

_SERVICE = "ReleaseService"


@dataclass(frozen=True, slots=True)
class WorkerRelease:
    """What one worker serves for a model. ``current``: the active release. ``release`` and ``loading`` are ids."""

    worker_id: str
    release: str
    loading: str
    error: str
    since: datetime | None
    last_seen: datetime | None
    current: bool


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """The active release, None before the first, and every worker that answers for the model.

    ``rolled_back_from``: id of the newer release that an operator went back from; while it is set the trainer activates
    no new head by itself.
    """

    active: ActiveRelease | None
    workers: Sequence[WorkerRelease]
    rolled_back_from: str = ""

    @property
    def swapped(self) -> bool:
        """Whether there are workers and every one serves the active release."""
        return bool(self.workers) and all(worker.current for worker in self.workers)


@dataclass(frozen=True, slots=True)
class ReleaseRefresh:
    """A request for a refresh. ``end_time`` None: it waits or runs; then one of ``release`` (an id) and ``error``."""

    name: str
    reason: str
    create_time: datetime | None
    end_time: datetime | None
    release: str
    error: str


class ReleaseClient(Client):
    """A ``Client`` that can look after releases, too. ``model`` is an id."""

    def __init__(self, address: str, project: str = "default", *, timeout: float = 30.0,
                 credentials: grpc.ChannelCredentials | None = None, api_key: str = "") -> None:
        super().__init__(address, project, timeout=timeout, credentials=credentials, api_key=api_key)
        self._stubs[_SERVICE] = release_service_pb2_grpc.ReleaseServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def fleet(self, model: str) -> FleetStatus:
        """What every worker serves for a model. ModelNotFound."""
        request = wire_messages.GetFleetStatusRequest(model=f"models/{model}")
        return self._do(Call(_SERVICE, "GetFleetStatus", request, _fleet))

    def refresh(self, model: str, reason: str = "") -> ReleaseRefresh:
        """Ask the trainer for a refresh. ModelNotFound."""
        request = wire_messages.RefreshReleaseRequest(model=f"models/{model}", reason=reason)
        return self._do(Call(_SERVICE, "RefreshRelease", request, _refresh))

    def refresh_status(self, name: str) -> ReleaseRefresh:
        """What became of a request."""
        request = wire_messages.GetReleaseRefreshRequest(name=name)
        return self._do(Call(_SERVICE, "GetReleaseRefresh", request, _refresh))


def _fleet(message: wire_messages.FleetStatus) -> FleetStatus:
    workers = [
        WorkerRelease(
            one.worker_id, _id(one.release), _id(one.loading_release), one.error, _time(one, "since_time"),
            _time(one, "last_seen_time"), one.current,
        )
        for one in message.workers
    ]  # fmt: skip
    active = wire.active_release(message.active) if message.HasField("active") else None
    return FleetStatus(active, workers, _id(message.rolled_back_from))


def _refresh(message: wire_messages.ReleaseRefresh) -> ReleaseRefresh:
    return ReleaseRefresh(
        message.name, message.reason, _time(message, "create_time"), _time(message, "end_time"), _id(message.release),
        message.error,
    )  # fmt: skip


def _id(name: str) -> str:
    return name.rpartition("/")[2]


def _time(message: Any, field: str) -> datetime | None:
    found: datetime | None = getattr(message, field).ToDatetime(UTC) if message.HasField(field) else None
    return found
