"""``python -m services.gateway.probe``: is the gateway of this container ready? Exit code 0: yes.

Why it exists: Kubernetes' own gRPC probes speak no TLS, and an open port says nothing of a gateway that drains or has
lost its database. This asks gRPC health as a client would, TLS included. It trusts the very certificate that the
gateway was given, under whatever name that has, because it calls by loopback.
"""

from __future__ import annotations

import socket
import ssl
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from byline.config import Settings, load_settings
from byline.errors import BylineError
from byline.security.settings import given

TIMEOUT_S = 3.0


def main() -> None:
    """Ask once, say why not."""
    try:
        settings = load_settings()
        problem = problem_of(settings, settings.grpc_address)
    except BylineError as error:
        problem = error.message
    if problem:
        print(f"not ready: {problem}", file=sys.stderr)
    raise SystemExit(1 if problem else 0)


def problem_of(settings: Settings, address: str) -> str:
    """Why the gateway that listens on ``address`` is not ready; empty if it is."""
    host, _, port = address.rpartition(":")
    target = f"{'127.0.0.1' if host in ('0.0.0.0', '[::]') else host}:{port}"  # noqa: S104 - compared, not bound
    try:
        with _channel(settings, target) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            status = stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S).status
    except grpc.RpcError as error:
        return f"health answers {error.code().name}: {error.details()}"
    except OSError as error:  # nobody listens, or TLS failed
        return str(error)
    name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
    return "" if status == health_pb2.HealthCheckResponse.SERVING else f"it says {name}"


def _channel(settings: Settings, target: str) -> grpc.Channel:
    if not given(settings.tls_certificate):
        return grpc.insecure_channel(target)
    own = (settings.client_certificate, settings.client_key) if given(settings.client_certificate) else None
    name = _name(target, settings.tls_certificate, own)
    chain, key = (None, None) if own is None else (file.read_bytes() for file in own)
    credentials = grpc.ssl_channel_credentials(settings.tls_certificate.read_bytes(), key, chain)
    return grpc.secure_channel(target, credentials, options=[("grpc.ssl_target_name_override", name)])


def _name(target: str, certificate: Path, own: tuple[Path, Path] | None) -> str:
    """A name that the served certificate is made out to."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(certificate)
    context.set_alpn_protocols(["h2"])
    if own is not None:
        context.load_cert_chain(*own)
    host, _, port = target.rpartition(":")
    with (
        socket.create_connection((host.strip("[]"), int(port)), timeout=TIMEOUT_S) as plain,
        context.wrap_socket(plain) as connection,
    ):
        names = (connection.getpeercert() or {}).get("subjectAltName", ())
    found = [str(value) for kind, value in names if kind in ("DNS", "IP Address")]  # type: ignore[str-unpack]
    return found[0].replace("*", "probe", 1) if found else host


if __name__ == "__main__":
    main()
