"""How connections to the gateway are protected, and what it refuses to listen on.

Why it exists: TLS must be able to change its certificate without a restart, and a gateway that asks nobody for a key
must not be reachable from another machine by mistake.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog

from byline.config import Settings
from byline.errors import SettingsInvalid
from byline.security.settings import given

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Transport:
    """``credentials`` None: plain text. ``keyed``: keys are asked for. ``terminated``: a proxy in front does TLS."""

    credentials: Any
    keyed: bool
    terminated: bool

    def check(self, address: str) -> None:
        """SettingsInvalid for an address where this would be open to strangers, or readable by them."""
        if is_loopback(address.rpartition(":")[0]):
            return
        if not self.keyed:
            raise SettingsInvalid(
                f"the gateway asks nobody for a key and will not listen on {address}: set BYLINE_AUTH_MODE=keys and "
                "make keys with `byline keys create`, or bind it to loopback",
                address=address,
            )
        if self.credentials is None and not self.terminated:
            raise SettingsInvalid(
                f"API keys would travel in plain text to {address}: set BYLINE_TLS_CERTIFICATE and BYLINE_TLS_KEY, "
                "or BYLINE_TLS_TERMINATED=true if TLS ends in a proxy in front of the gateway",
                address=address,
            )


def transport_of(settings: Settings) -> Transport:
    """From the settings. SettingsInvalid for files that are missing or come without their counterpart."""
    credentials = None
    if given(settings.tls_certificate) or given(settings.tls_key):
        if not (given(settings.tls_certificate) and given(settings.tls_key)):
            raise SettingsInvalid("BYLINE_TLS_CERTIFICATE and BYLINE_TLS_KEY go together")
        client_ca = settings.tls_client_ca if given(settings.tls_client_ca) else None
        files = Certificates(settings.tls_certificate, settings.tls_key, client_ca)
        credentials = grpc.dynamic_ssl_server_credentials(
            files.read(), files.changed, require_client_authentication=client_ca is not None
        )
    elif given(settings.tls_client_ca):
        raise SettingsInvalid("BYLINE_TLS_CLIENT_CA needs BYLINE_TLS_CERTIFICATE and BYLINE_TLS_KEY")
    return Transport(credentials, settings.auth_mode == "keys", settings.tls_terminated)


class Certificates:
    """The files of the server's certificate, read again for new connections once one of them has changed."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._files = tuple(filter(None, (certificate, key, client_ca)))
        self._client_ca = client_ca
        self._seen: tuple[int, ...] = ()

    def read(self) -> Any:
        """The configuration as the files are now. SettingsInvalid if one cannot be read."""
        try:
            self._seen = self._stamps()
            certificate, key, *rest = (file.read_bytes() for file in self._files)
        except OSError as error:
            raise SettingsInvalid(f"cannot read {error.filename}: {error.strerror}", file=error.filename) from error
        return grpc.ssl_server_certificate_configuration([(key, certificate)], rest[0] if rest else None)

    def changed(self) -> Any:
        """gRPC asks this for each new connection: the new configuration, or None while nothing has changed."""
        try:
            if self._stamps() == self._seen:
                return None
            fresh = self.read()
        except (OSError, SettingsInvalid, ValueError) as error:  # half-way through a rotation: keep the old one
            log.warning("certificate_not_read", error=type(error).__name__)
            self._seen = ()
            return None
        log.info("certificate_changed")
        return fresh

    def _stamps(self) -> tuple[int, ...]:
        return tuple(file.stat().st_mtime_ns for file in self._files)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host.startswith("unix:") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
