"""Fixtures every test may use: a real Postgres and a real Redis-protocol server, from the wheels.

Both servers are started once per session, on first use, and stopped at its end (the kernel stops
them if the session is killed). ``database_url`` is a fresh database with all migrations applied,
copied from a template in some tens of milliseconds.
"""

from __future__ import annotations

import http.server
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from byline.embedded.postgres import PrivatePostgres
from byline.embedded.valkey import PrivateValkey

_TEMPLATE = "byline_template"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What one process runs when several share the tests (``-n 2``): a file, for its fixtures; all of e2e, because they
    share one system of processes and some of them watch the clock."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            place = nodeid.split("::")[0]
            return "e2e" if place.startswith("tests/e2e/") else place

    return ByFile(config, log)


def _plain(url: str) -> str:
    return url.replace("postgresql+psycopg://", "postgresql://")


def _named(url: str, database: str) -> str:
    return f"{url.rpartition('/')[0]}/{database}"


def _execute(url: str, statement: str) -> None:
    with psycopg.connect(_plain(url), autocommit=True) as connection:
        connection.execute(statement.encode())


@pytest.fixture(scope="session")
def server_directory() -> Iterator[Path]:
    """A folder everybody may enter: root's Postgres runs as nobody, and pytest's own folders have mode 0700."""
    folder = Path(tempfile.mkdtemp(prefix="byline-test-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def private_postgres(server_directory: Path) -> Iterator[PrivatePostgres]:
    """The session's Postgres server. Tests that kill a server start one of their own instead."""
    server = PrivatePostgres(
        server_directory / "postgres", die_with_parent=True,
        settings={"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"},
    )
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def postgres_url(private_postgres: PrivatePostgres) -> str:
    """SQLAlchemy URL of the session's server; its database is empty and shared: use ``database_url`` for tables."""
    return private_postgres.url


@pytest.fixture(scope="session")
def migrated_template(postgres_url: str) -> str:
    """Name of the database with all migrations applied, from which each test's database is copied."""
    from byline.db import migrate

    _execute(postgres_url, f"CREATE DATABASE {_TEMPLATE}")
    migrate(_named(postgres_url, _TEMPLATE))
    return _TEMPLATE


@pytest.fixture
def empty_database_url(postgres_url: str) -> Iterator[str]:
    """SQLAlchemy URL of a fresh database without tables (for tests of the migrations themselves)."""
    yield from _database(postgres_url, "template1")


@pytest.fixture
def database_url(postgres_url: str, migrated_template: str) -> Iterator[str]:
    """SQLAlchemy URL of a fresh database with all migrations applied; dropped after the test."""
    yield from _database(postgres_url, migrated_template)


def _database(url: str, template: str) -> Iterator[str]:
    name = f"t_{uuid.uuid4().hex}"
    _execute(url, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield _named(url, name)
    _execute(url, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def private_valkey(server_directory: Path) -> Iterator[PrivateValkey]:
    """The session's Redis-protocol server."""
    server = PrivateValkey(server_directory / "valkey", die_with_parent=True)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_url(private_valkey: PrivateValkey) -> Iterator[str]:
    """URL of an empty Redis; emptied again after the test."""
    client: Any = redis.Redis.from_url(private_valkey.url)
    client.flushall()
    yield private_valkey.url
    client.flushall()
    client.close()


@dataclass
class Collector:
    """An OpenTelemetry collector's OTLP/HTTP door, and what came through it."""

    address: str
    received: list[ExportTraceServiceRequest] = field(default_factory=list)

    def spans(self, trace_id: str) -> list[tuple[str, Any]]:
        """(service name, span) of all spans of a trace."""
        return [
            (next(a.value.string_value for a in of.resource.attributes if a.key == "service.name"), span)
            for request in list(self.received)
            for of in request.resource_spans
            for scope in of.scope_spans
            for span in scope.spans
            if span.trace_id.hex() == trace_id
        ]


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """A collector that anything in this session may export its spans to."""

    class Door(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.end_headers()
            if self.path == "/v1/traces":
                found.received.append(ExportTraceServiceRequest.FromString(body))

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Door)
    found = Collector(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, name="collector", daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()
