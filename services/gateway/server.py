"""The gRPC server: services, health, reflection, limits, and how it stops.

Why it exists: start and stop in one place. Stopping is: NOT_SERVING, wait for load balancers to notice, end
the watches (clients watch again elsewhere), let running calls finish, close.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from attribution.v1 import (
    attribution_service_pb2,
    attribution_service_pb2_grpc,
    catalog_service_pb2,
    catalog_service_pb2_grpc,
    curation_service_pb2,
    curation_service_pb2_grpc,
    operator_service_pb2,
    operator_service_pb2_grpc,
    release_service_pb2,
    release_service_pb2_grpc,
)
from byline.errors import SettingsInvalid
from byline.telemetry import RPC_SECONDS
from services.gateway.attribution_servicer import AttributionServicer
from services.gateway.catalog_servicer import CatalogServicer
from services.gateway.context import GatewayContext
from services.gateway.curation_servicer import CurationServicer
from services.gateway.health import Health
from services.gateway.housekeeping import keep_house
from services.gateway.interceptor import CallInterceptor
from services.gateway.operator_servicer import OperatorServicer
from services.gateway.release_servicer import ReleaseServicer

log = structlog.get_logger(__name__)

#: The longest a unary call may take, whatever its deadline says.
MAX_CALL_S = 10.0
SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (attribution_service_pb2, "AttributionService"),
        (catalog_service_pb2, "CatalogService"),
        (operator_service_pb2, "OperatorService"),
        (curation_service_pb2, "CurationService"),
        (release_service_pb2, "ReleaseService"),
    )
)
_OPTIONS = (
    # Two gateways on one port would share it silently.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
    # Connections are renewed so that new replicas get their share.
    ("grpc.max_connection_age_ms", 30 * 60 * 1000),
    ("grpc.max_connection_age_grace_ms", 11 * 60 * 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 20_000),
)


@dataclass
class Gateway:
    """A started server. ``address`` is where it really listens (port 0 means any free one)."""

    server: Any
    address: str
    attribution: AttributionServicer
    health: Health
    background: tuple[asyncio.Task[None], ...]

    async def stop(self, notice_s: float, grace_s: float) -> None:
        """Drain and stop: ``notice_s`` for load balancers to notice, ``grace_s`` for running calls to end."""
        log.info("draining", notice_s=notice_s, grace_s=grace_s)
        await self.health.drain()
        for task in self.background:
            task.cancel()
        await asyncio.sleep(notice_s)
        self.attribution.drain()
        await self.server.stop(grace_s)
        log.info("stopped")


async def start(context: GatewayContext, address: str, database_url: str, *, reflect: bool = True) -> Gateway:
    """Start serving on ``address``. SettingsInvalid if it cannot be bound, or would be open to strangers there.

    Where keys are asked for, nobody is told what the API looks like: reflection would need none.
    """
    context.transport.check(address)
    server = grpc.aio.server(
        interceptors=[CallInterceptor(MAX_CALL_S, _observe, context.guard, context.trace_share)],
        options=_OPTIONS,
        maximum_concurrent_rpcs=5_000,
    )
    attribution = AttributionServicer(context)
    health = Health(context, SERVICES)
    attribution_service_pb2_grpc.add_AttributionServiceServicer_to_server(attribution, server)  # type: ignore[no-untyped-call]
    catalog_service_pb2_grpc.add_CatalogServiceServicer_to_server(CatalogServicer(context), server)  # type: ignore[no-untyped-call]
    operator_service_pb2_grpc.add_OperatorServiceServicer_to_server(OperatorServicer(context), server)  # type: ignore[no-untyped-call]
    curation_service_pb2_grpc.add_CurationServiceServicer_to_server(CurationServicer(context), server)  # type: ignore[no-untyped-call]
    release_service_pb2_grpc.add_ReleaseServiceServicer_to_server(ReleaseServicer(context), server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    if reflect and not context.transport.keyed:
        own = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection((*SERVICES, own, reflection.SERVICE_NAME), server)
    host = address.rpartition(":")[0]
    try:
        tls = context.transport.credentials
        port = server.add_insecure_port(address) if tls is None else server.add_secure_port(address, tls)
    except RuntimeError as error:
        raise SettingsInvalid(
            f"cannot listen on {address}: is another gateway running there?", address=address
        ) from error
    context.changes.start(database_url)
    await server.start()
    watching = asyncio.create_task(health.watch())
    keeping = asyncio.create_task(keep_house(context))
    bound = f"{host}:{port}"
    log.info("serving", address=bound, services=list(SERVICES), tls=tls is not None, keys=context.transport.keyed)
    return Gateway(server, bound, attribution, health, (watching, keeping))


async def serve(
    context: GatewayContext, address: str, database_url: str, *, notice_s: float, grace_s: float, reflect: bool = True
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. A second one ends the process at once."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def asked(number: int) -> None:
        if stop.is_set():
            leave(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked, number)
    gateway = await start(context, address, database_url, reflect=reflect)
    await stop.wait()
    await gateway.stop(notice_s, grace_s)


def leave(status: int) -> NoReturn:
    """End the process without waiting for its threads, which may hang in the database. What was acknowledged is
    committed, so nothing is lost."""
    log.warning("left", status=status)
    logging.shutdown()
    os._exit(status)


def _observe(method: str, code: str, seconds: float) -> None:
    RPC_SECONDS.labels(method.removeprefix("/attribution.v1."), code).observe(seconds)
