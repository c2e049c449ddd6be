"""``byline up`` and ``byline down``: the whole system on one machine."""

from __future__ import annotations

import threading
from typing import Annotated

import typer
from rich.console import Console

from byline.config import load_settings
from byline.embedded.control import bring_down, bring_up
from byline.embedded.services import NAMES, chosen
from byline.embedded.supervisor import Supervisor
from byline.telemetry import install_signal_handlers

ALL = ",".join(NAMES)
Services = Annotated[str, typer.Option(help="Comma-separated services to start.")]


def up(
    services: Services = ALL,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay attached until Ctrl-C.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait until everything can be used.")] = 120.0,
) -> None:
    """Start Postgres and Redis (unless BYLINE_DATABASE_URL and BYLINE_REDIS_URL name others) and the services."""
    settings = load_settings()
    names = [service.name for service in chosen(filter(None, services.split(",")))]
    if foreground:
        stop = threading.Event()
        install_signal_handlers(stop)
        Supervisor(settings, chosen(names)).run(stop.wait)
        return
    console = Console(stderr=True)
    servers = bring_up(settings, names, timeout_s=timeout, report=console.print)
    console.print(f"up: gRPC at {servers.grpc_address}, state and logs in {settings.state_dir}")


def down(timeout: Annotated[float, typer.Option(help="Seconds to wait before killing.")] = 60.0) -> None:
    """Stop the services and the private servers. Their data stays in the state directory."""
    settings = load_settings()
    stopped = bring_down(settings, timeout)
    Console(stderr=True).print("down" if stopped else f"nothing was running under {settings.state_dir}")
