"""The settings of security, a part of ``byline.config.Settings``.

Why it exists: who may call, how connections are protected and how long things are kept are decisions of one person,
who finds them here. The defaults are those of a laptop: no keys, and for that reason no address but loopback.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings

SECRETS = ("api_key", "signing_key")
_FILES = ("tls_certificate", "tls_key", "tls_client_ca", "client_ca", "client_certificate", "client_key")
#: Shorter keys can be guessed.
MIN_SIGNING_KEY = 32


class SecuritySettings(BaseSettings):
    """What ``BYLINE_*`` says of security. An empty path or text means: not used."""

    #: ``none``: everybody is trusted, which the gateway refuses on any address but loopback; ``keys``: API keys.
    auth_mode: Literal["none", "keys"] = "none"
    #: The gateway's certificate chain and key (PEM), read again when they change; with ``tls_client_ca`` clients must
    #: show a certificate of that CA.
    tls_certificate: Path = Path()
    tls_key: Path = Path()
    tls_client_ca: Path = Path()
    #: TLS ends in a proxy in front of the gateway: it may then listen in plain text on any address.
    tls_terminated: bool = False
    #: A client's own: its key, the CA it trusts (TLS is used if this is set), and its certificate for mutual TLS.
    api_key: str = Field("", repr=False)
    client_ca: Path = Path()
    client_certificate: Path = Path()
    client_key: Path = Path()
    #: Signs release manifests and the audit's chain. Several, separated by commas: the first signs, all are trusted.
    signing_key: str = Field("", repr=False)
    #: Calls a second that a key, and all keys of a project together, may make (0: as many as they like).
    rate_per_second: float = Field(0.0, ge=0)
    project_rate_per_second: float = Field(0.0, ge=0)
    #: Jobs are deleted with their answers and query images so many days after they ended (0: kept until deleted).
    retention_days: float = Field(30.0, ge=0)

    @field_validator(*_FILES)
    @classmethod
    def _absolute_file(cls, value: Path) -> Path:
        return value.expanduser().absolute() if value != Path() else value

    @field_validator("signing_key")
    @classmethod
    def _strong(cls, value: str) -> str:
        if any(len(key.strip()) < MIN_SIGNING_KEY for key in value.split(",")) and value:
            raise ValueError(f"each key needs {MIN_SIGNING_KEY} characters or more; try `openssl rand -hex 32`")
        return value


def given(path: Path) -> bool:
    """Whether a setting names a file."""
    return path != Path()
