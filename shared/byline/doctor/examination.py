"""The whole examination, in the order in which one thing rests on another.

Why it exists: without a database most questions cannot be asked, and that must give one finding, not ten errors.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy.exc import SQLAlchemyError

from byline.config import Settings
from byline.db.session import make_engine, transaction
from byline.doctor import broker, database, files, fleet
from byline.doctor.finding import Finding, Level, ok
from byline.errors import DatabaseUnavailable, SettingsInvalid


def examine(
    settings: Settings, *, now: Callable[[], datetime] = lambda: datetime.now(UTC), digests: bool = True,
    credentials: grpc.ChannelCredentials | None = None,
) -> list[Finding]:  # fmt: skip
    """Every finding. ``digests``: also read all bytes of the active releases. Never raises for what it looks at."""
    findings = files.room({"state": settings.state_dir, "blobs": settings.blob_dir, "releases": settings.release_dir})
    findings += _of_database(settings, now, digests)
    findings += _of_broker(settings)
    findings.append(gateway(settings.grpc_address, credentials))
    return findings


def gateway(address: str, credentials: grpc.ChannelCredentials | None = None, timeout_s: float = 3.0) -> Finding:
    """Does the gateway say that it serves?"""
    channel = grpc.insecure_channel(address) if credentials is None else grpc.secure_channel(address, credentials)
    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
    except grpc.RpcError as error:
        found = f"{address} does not answer ({error.code().name})"
        return Finding("gateway", Level.FAILURE, found, "start it; with TLS, say where the certificate is")
    finally:
        channel.close()
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        advice = "it drains, or cannot reach Postgres: see its log"
        return Finding("gateway", Level.FAILURE, f"{address} is not serving", advice)
    return ok("gateway", f"{address} serves")


def _of_database(settings: Settings, now: Callable[[], datetime], digests: bool) -> list[Finding]:
    checks: list[Callable[[Any], Finding | list[Finding]]] = [
        database.version, database.durability, lambda connection: database.clock(connection, now),
        database.connections, database.migrations,
    ]  # fmt: skip
    on_tables: list[Callable[[Any], Finding | list[Finding]]] = [fleet.workers, fleet.queues]
    if digests:
        on_tables.append(files.releases)
    try:
        engine = make_engine(settings.database_url, pool_size=1, application="byline-doctor")
    except SettingsInvalid as error:
        return [Finding("postgres", Level.FAILURE, error.message, "start it, or set BYLINE_DATABASE_URL")]
    findings: list[Finding] = []
    try:
        with transaction(engine) as connection:
            for check in checks:
                findings += _as_list(check(connection))
        if findings[-1].level is Level.OK:  # the tables are the ones that the next questions are about
            with transaction(engine) as connection:
                for check in on_tables:
                    findings += _as_list(check(connection))
    except (DatabaseUnavailable, SQLAlchemyError) as error:
        shown = str(error.__cause__ or error).strip().splitlines()[0]
        findings.append(Finding("postgres", Level.FAILURE, f"cannot be asked: {shown}", "see BYLINE_DATABASE_URL"))
    finally:
        engine.dispose()
    return findings


def _of_broker(settings: Settings) -> list[Finding]:
    try:
        url = settings.redis_url
    except SettingsInvalid as error:
        return [Finding("redis", Level.FAILURE, error.message, "start it, or set BYLINE_REDIS_URL")]
    return [*broker.broker(url), *broker.timeouts(url, settings.lease_seconds, settings.heartbeat_seconds)]


def _as_list(found: Finding | list[Finding]) -> list[Finding]:
    return found if isinstance(found, list) else [found]
