"""Channels: plain or TLS, with or without an API key.

Why it exists: the sync and the async client, the command line and the health check of ``byline up`` must reach a
protected gateway in the same way, and none of them may send a key in plain text to another machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from byline.client.calls import CHANNEL_OPTIONS
from byline.config import Settings
from byline.errors import SettingsInvalid
from byline.security.settings import given

_LOCAL = ("localhost:", "127.", "[::1]:", "unix:")


def tls(
    ca: Path | str | None = None, certificate: Path | str | None = None, key: Path | str | None = None
) -> grpc.ChannelCredentials:
    """Credentials of a TLS connection (PEM files). ``ca``: who signed the server's certificate, None for the system's
    list; ``certificate`` and ``key``: the client's own, for mutual TLS. SettingsInvalid if a file cannot be read."""
    if (certificate is None) != (key is None):
        raise SettingsInvalid("a client certificate and its key go together")
    roots, own_key, chain = (None if file is None else _read(Path(file)) for file in (ca, key, certificate))
    return grpc.ssl_channel_credentials(roots, own_key, chain)


def client_options(settings: Settings) -> Mapping[str, Any]:
    """``credentials`` and ``api_key`` of a ``Client`` as the settings name them."""
    own = given(settings.client_certificate)
    credentials = None
    if given(settings.client_ca) or own:
        credentials = tls(
            settings.client_ca if given(settings.client_ca) else None,
            settings.client_certificate if own else None,
            settings.client_key if given(settings.client_key) else None,
        )
    return {"credentials": credentials, "api_key": settings.api_key}


def open_channel(address: str, credentials: grpc.ChannelCredentials | None, api_key: str) -> Any:
    """A synchronous channel. SettingsInvalid for a key that would travel in plain text to another machine."""
    _refuse_to_shout(address, credentials, api_key)
    if credentials is None:
        channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    else:
        channel = grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
    return grpc.intercept_channel(channel, _Keyed(api_key)) if api_key else channel


def open_aio_channel(address: str, credentials: grpc.ChannelCredentials | None, api_key: str) -> Any:
    """The same for asyncio."""
    _refuse_to_shout(address, credentials, api_key)
    keyed = [kind(api_key) for kind in (_AioUnary, _AioStream, _AioUpload)] if api_key else None
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS, interceptors=keyed)
    return grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS, interceptors=keyed)


def _refuse_to_shout(address: str, credentials: grpc.ChannelCredentials | None, api_key: str) -> None:
    if api_key and credentials is None and not address.startswith(_LOCAL):
        raise SettingsInvalid(
            f"the API key would travel in plain text to {address}: use TLS (BYLINE_CLIENT_CA, or credentials=tls(...))",
            address=address,
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsInvalid(f"cannot read {path}: {error.strerror}", file=str(path)) from error


class _Details(NamedTuple):
    """A call's details: gRPC offers no way to change its own."""

    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any = None


class _Keyed(
    grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamUnaryClientInterceptor  # type: ignore[misc]
):
    """Adds the key to every call of a synchronous channel."""

    def __init__(self, api_key: str) -> None:
        self._header = ("authorization", f"Bearer {api_key}")

    def _call(self, go_on: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        metadata = [*(details.metadata or ()), self._header]
        return go_on(
            _Details(details.method, details.timeout, metadata, details.credentials, details.wait_for_ready), request
        )

    intercept_unary_unary = intercept_unary_stream = intercept_stream_unary = _call


class _AioKeyed:
    def __init__(self, api_key: str) -> None:
        self._header = ("authorization", f"Bearer {api_key}")

    async def _call(self, go_on: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()), self._header)
        return await go_on(details._replace(metadata=metadata), request)


class _AioUnary(_AioKeyed, grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    intercept_unary_unary = _AioKeyed._call


class _AioStream(_AioKeyed, grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[misc]
    intercept_unary_stream = _AioKeyed._call


class _AioUpload(_AioKeyed, grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[misc]
    intercept_stream_unary = _AioKeyed._call
