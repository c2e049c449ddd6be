"""Where the private servers of a state directory are, as told by the supervisor that runs them.

Why it exists: ``byline submit`` in another terminal, or a service started by hand, must find the
servers ``byline up`` started, without environment variables. It imports nothing heavy, because
every command loads it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from byline.embedded.process import ProcessIdentity

SERVERS_FILE = "servers.json"


@dataclass(frozen=True, kw_only=True)
class Servers:
    """Addresses of one system; the URLs carry generated passwords. ``ready`` once the tables exist and the
    services were started."""

    database_url: str
    redis_url: str
    grpc_address: str
    supervisor_pid: int
    supervisor_created: float
    ready: bool


def announce(state_dir: Path, servers: Servers) -> None:
    """Write the addresses for :func:`discover`, readable by the owner only, in one atomic step."""
    path = state_dir / SERVERS_FILE
    temporary = path.with_suffix(".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        json.dump(asdict(servers), stream, indent=1)
    temporary.replace(path)


def withdraw(state_dir: Path) -> None:
    """Say that no servers run under this state directory any more."""
    (state_dir / SERVERS_FILE).unlink(missing_ok=True)


def discover(state_dir: Path) -> Servers | None:
    """The servers running under ``state_dir``; None when there are none (a dead supervisor's do not count)."""
    try:
        found = Servers(**json.loads((state_dir / SERVERS_FILE).read_text()))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, TypeError, PermissionError):
        return None  # Half-written by a crash, of another version, or of another person: not usable.
    supervisor = ProcessIdentity(found.supervisor_pid, found.supervisor_created)
    return found if supervisor.alive() else None
