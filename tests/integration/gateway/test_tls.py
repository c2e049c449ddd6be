"""TLS and mutual TLS with certificates made here, and their rotation under a running gateway."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from byline.client import AsyncClient, Client, tls
from byline.client.connection import client_options
from byline.config import load_settings
from byline.errors import CallTimedOut, ServerUnreachable, SettingsInvalid
from byline.security.keys import KeyStore
from services.gateway.context import build_context
from services.gateway.probe import problem_of
from services.gateway.server import Gateway, start
from services.gateway.transport import transport_of

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificates with openssl")

UNREACHABLE = (ServerUnreachable, CallTimedOut)


class Authority:
    """A CA that signs certificates for this machine."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.ca = folder / f"{name}.pem"
        _openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                 "-subj", f"/CN={name}", "-keyout", folder / f"{name}.key", "-out", self.ca)

    def sign(self, name: str, certificate: Path, key: Path) -> None:
        request, extensions = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
        extensions.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        _openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={name}",
                 "-keyout", key, "-out", request)
        _openssl("x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", self.folder / f"{self.name}.key",
                 "-CAcreateserial", "-days", "2", "-extfile", extensions, "-out", certificate)


def _openssl(*arguments: Any) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)


@contextmanager
def running(
    database_url: str, state: Path, **settings: Any
) -> Iterator[tuple[Gateway, asyncio.AbstractEventLoop]]:
    loaded = load_settings(
        database_url=database_url, state_dir=state, grpc_address="127.0.0.1:0", auth_mode="keys", **settings
    )
    context = build_context(loaded)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    started = asyncio.run_coroutine_threadsafe(start(context, loaded.grpc_address, database_url), loop).result(60)
    try:
        yield started, loop
    finally:
        asyncio.run_coroutine_threadsafe(started.stop(0.0, 1.0), loop).result(60)
        context.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@contextmanager
def gateway(database_url: str, state: Path, **settings: Any) -> Iterator[str]:
    with running(database_url, state, **settings) as (started, _):
        yield started.address


def lists(address: str, key: str, credentials: Any, timeout: float = 30.0) -> bool:
    with Client(address, "acme", api_key=key, credentials=credentials, timeout=timeout) as client:
        return list(client.list()) == []


def test_tls_mutual_tls_and_a_rotation_without_restart(database_url: str, tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
    own, own_key = tmp_path / "client.pem", tmp_path / "client.key"
    foreign, foreign_key = tmp_path / "foreign.pem", tmp_path / "foreign.key"
    ours.sign("server", certificate, key)
    ours.sign("client", own, own_key)
    theirs.sign("foreign", foreign, foreign_key)

    with gateway(database_url, tmp_path, tls_certificate=certificate, tls_key=key, tls_client_ca=ours.ca) as address:
        from byline.db import make_engine

        engine = make_engine(database_url, pool_size=1)
        token = KeyStore(engine).create(project_id="acme", name="t", scopes=["jobs:read"]).token
        engine.dispose()

        mutual = tls(ours.ca, own, own_key)
        with Client(address, "acme", api_key=token, credentials=mutual, timeout=30) as lasting:
            assert list(lasting.list()) == []
            for wrong in (
                None,  # plain text
                tls(theirs.ca, own, own_key),  # does not trust the server
                tls(ours.ca),  # shows no certificate
                tls(ours.ca, foreign, foreign_key),  # shows one of another CA
            ):
                with pytest.raises(UNREACHABLE):
                    lists(address, token, wrong, timeout=3.0)

            # Rotation: the files are replaced, one after the other, while the gateway runs.
            theirs.sign("server2", certificate, key)
            deadline = time.monotonic() + 60
            while True:
                try:
                    assert lists(address, token, tls(theirs.ca, own, own_key), timeout=3.0)
                    break
                except UNREACHABLE:
                    assert time.monotonic() < deadline, "the new certificate is not served"
            with pytest.raises(UNREACHABLE):
                lists(address, token, mutual, timeout=3.0)
            assert list(lasting.list()) == []  # connections made before go on

        settings = load_settings(
            api_key=token, client_ca=theirs.ca, client_certificate=own, client_key=own_key, state_dir=tmp_path
        )

        async def asynchronous() -> list[Any]:
            async with AsyncClient(address, "acme", **client_options(settings)) as client:
                return list(await client.list())

        assert asyncio.run(asynchronous()) == []


@pytest.mark.parametrize("mutual", [False, True], ids=["tls", "mutual"])
def test_the_readiness_probe_asks_over_tls_and_a_draining_gateway_is_not_ready(
    database_url: str, tmp_path: Path, mutual: bool
) -> None:
    authority, clients = Authority(tmp_path, "servers"), Authority(tmp_path, "clients")
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
    own, own_key = tmp_path / "client.pem", tmp_path / "client.key"
    authority.sign("server", certificate, key)
    clients.sign("client", own, own_key)
    served: dict[str, Any] = {"tls_certificate": certificate, "tls_key": key}
    shown = {"client_certificate": own, "client_key": own_key} if mutual else {}
    settings = load_settings(state_dir=tmp_path, **served, **shown)
    if mutual:
        served["tls_client_ca"] = clients.ca
    with running(database_url, tmp_path, **served) as (started, loop):
        everywhere = started.address.replace("127.0.0.1", "0.0.0.0")  # as a container's gateway is told to listen
        deadline = time.monotonic() + 60
        while problem := problem_of(settings, everywhere):  # it has not asked its database yet
            assert time.monotonic() < deadline, problem
        if mutual:
            assert problem_of(load_settings(state_dir=tmp_path, tls_certificate=certificate, tls_key=key), everywhere)
        asyncio.run_coroutine_threadsafe(started.health.drain(), loop).result(10)
        assert problem_of(settings, everywhere) == "it says NOT_SERVING"
    assert "refused" in problem_of(settings, everywhere)


def test_half_a_configuration_is_refused_at_start(tmp_path: Path) -> None:
    some = tmp_path / "some.pem"
    some.write_text("x")
    for settings in ({"tls_certificate": some}, {"tls_key": some}, {"tls_client_ca": some},
                     {"tls_certificate": some, "tls_key": tmp_path / "absent"}):
        with pytest.raises(SettingsInvalid):
            transport_of(load_settings(**settings))
    with pytest.raises(SettingsInvalid):
        tls(some, some)
    with pytest.raises(SettingsInvalid):
        tls(tmp_path / "absent")
