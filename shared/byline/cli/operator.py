"""What the operator's commands share: the connection, the options, and how they print.

Why it exists: every verb has the same ``--address`` and ``--json`` and the same JSON, or scripts could not rely on it.
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Annotated, Any

import typer

from byline.client.connection import client_options
from byline.client.operations import OperatorClient
from byline.config import load_settings

Address = Annotated[str | None, typer.Option(help="host:port of the gateway (BYLINE_GRPC_ADDRESS).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def open_operator(address: str | None, project: str | None = None) -> OperatorClient:
    """An operator's client of the running gateway, or of the one named."""
    settings = load_settings()
    name = address or settings.grpc_address
    return OperatorClient(name, project or settings.project_id, **client_options(settings))


def say(value: Any) -> None:
    """Print as JSON."""
    typer.echo(json.dumps(value, indent=2, default=_plain))


def line(text: str) -> None:
    """Print one line."""
    typer.echo(text)


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    return str(value)
