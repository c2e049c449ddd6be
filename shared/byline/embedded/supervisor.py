"""The one process behind ``byline up``: owns the private servers and the services, restarts what dies.

Why it exists: without a service manager somebody has to start six programs and two servers in order,
keep them running, and stop them in order. It keeps no state that matters: after ``kill -9`` of the
supervisor its successor stops what was left and starts everything again from the same data.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from byline.config import DEFAULT_GRPC_ADDRESS, Settings, as_environment
from byline.embedded.discovery import Servers, announce, withdraw
from byline.embedded.postgres import PrivatePostgres
from byline.embedded.process import ProcessIdentity, ServerProcess, free_port, port_is_free, stop_stranger
from byline.embedded.services import CrashCount, Service
from byline.embedded.status import ProcessStatus, read_status, write_status
from byline.embedded.valkey import PrivateValkey
from byline.errors import ServerNotStarted
from byline.telemetry import get_logger

LOCK_FILE = "supervisor.lock"
_POLL_S = 0.1

log = get_logger("byline.supervisor")


@dataclass
class _Child:
    """Something that runs, and what is needed to run it again."""

    name: str
    start: Callable[[], ServerProcess]
    process: ServerProcess | None = None
    started_at: float = 0.0
    start_again_at: float | None = None
    last_exit: int | None = None
    crashes: CrashCount = field(default_factory=CrashCount)

    def launch(self) -> None:
        """Start it; a failed start counts as a crash."""
        self.start_again_at = None
        self.started_at = time.monotonic()
        try:
            self.process = self.start()
        except ServerNotStarted as error:
            self.start_again_at = time.monotonic() + self.crashes.ended(0.0)
            log.error("start_failed", process=self.name, error=error.message)
            return
        log.info("started", process=self.name, pid=self.process.identity.pid)

    def tend(self) -> bool:
        """Notice its end, start it again when its time has come; True if anything changed."""
        now = time.monotonic()
        if self.start_again_at is not None:
            if now < self.start_again_at:
                return False
            self.launch()
            return True
        if self.process is None or self.process.running():
            return False
        self.process.kill_orphans()
        self.last_exit = self.process.popen.returncode
        delay = self.crashes.ended(now - self.started_at)
        self.start_again_at = now + delay
        log.warning("ended", process=self.name, status=self.last_exit, again_in_s=delay, crashes=self.crashes.in_a_row)
        return True

    def status(self) -> ProcessStatus | None:
        """Its line of the status file; None before its first start."""
        if self.process is None:
            return None
        running = self.start_again_at is None and self.process.running()
        return ProcessStatus(
            name=self.name, state="running" if running else "waiting", pid=self.process.identity.pid,
            created=self.process.identity.created, crashes=self.crashes.in_all,
            crashes_in_a_row=self.crashes.in_a_row, last_exit=self.last_exit,
            stop_signal=int(self.process.stop_signal), log=str(self.process.log),
        )


class Supervisor:
    """Runs one system under ``settings.state_dir`` until it is told to stop."""

    def __init__(self, settings: Settings, services: Sequence[Service]) -> None:
        self._settings = settings
        self._state_dir = settings.state_dir
        self._services = services
        self._servers: list[_Child] = []
        self._children: list[_Child] = []

    def run(self, wait: Callable[[float], bool]) -> None:
        """Start everything and keep it running until ``wait(seconds)`` returns True; then stop everything.

        Raises ServerNotStarted when another supervisor runs here, or a server does not come up at all.
        """
        self._state_dir.mkdir(parents=True, exist_ok=True)
        with _only_one(self._state_dir):
            stop_leftovers(self._state_dir)
            try:
                self._start()
                while not wait(_POLL_S):
                    if any([child.tend() for child in [*self._servers, *self._children]]):
                        self._write_status()
            finally:
                self._stop()

    def _start(self) -> None:
        addresses = self._start_servers()
        announce(self._state_dir, addresses)
        from byline.db import migrate  # Alembic is slow to import; the servers are up already.

        migrate(addresses.database_url)
        environment = {
            "OMP_NUM_THREADS": str(self._settings.torch_threads),
            **os.environ,
            **as_environment(self._settings),
            "BYLINE_DATABASE_URL": addresses.database_url,
            "BYLINE_REDIS_URL": addresses.redis_url,
            "BYLINE_GRPC_ADDRESS": addresses.grpc_address,
            "PYTHONUNBUFFERED": "1",
        }
        self._children = [_Child(service.name, self._starter(service, environment)) for service in self._services]
        for child in self._children:
            child.launch()
            self._write_status()
        announce(self._state_dir, replace(addresses, ready=True))
        log.info("up", grpc_address=addresses.grpc_address)

    def _start_servers(self) -> Servers:
        database_url, redis_url = self._settings.configured_database_url, self._settings.configured_redis_url
        if not database_url:
            postgres = PrivatePostgres(self._state_dir / "postgres")
            self._servers.append(_Child("postgres", lambda: _started(postgres)))
            database_url = postgres.url
        if not redis_url:
            valkey = PrivateValkey(self._state_dir / "valkey")
            self._servers.append(_Child("valkey", lambda: _started(valkey)))
            redis_url = valkey.url
        for server in self._servers:
            server.launch()
            if server.process is None:
                raise ServerNotStarted(f"{server.name} did not start; see {self._state_dir}/logs/supervisor.log")
            self._write_status()
        me = ProcessIdentity.of(os.getpid())
        assert me is not None, "this process exists"  # noqa: S101
        return Servers(database_url=database_url, redis_url=redis_url, grpc_address=_listen_address(self._settings),
                       supervisor_pid=me.pid, supervisor_created=me.created, ready=False)

    def _starter(self, service: Service, environment: dict[str, str]) -> Callable[[], ServerProcess]:
        log_file = self._state_dir / "logs" / f"{service.name}.log"
        return lambda: ServerProcess.start(
            service.name, service.command(), log=log_file, cwd=self._state_dir, environment=environment
        )

    def _stop(self) -> None:
        """Services first and all at once, then the servers they use; the addresses last."""
        running = [child.process for child in self._children if child.process and child.process.running()]
        for process in running:
            process.popen.send_signal(process.stop_signal)
        deadline = time.monotonic() + self._settings.drain_seconds + 5.0
        for process in running:
            process.stop(max(0.1, deadline - time.monotonic()))
        for server in reversed(self._servers):
            if server.process:
                server.process.stop(20.0)
        self._children, self._servers = [], []
        write_status(self._state_dir, [])
        withdraw(self._state_dir)
        log.info("down")

    def _write_status(self) -> None:
        lines = [child.status() for child in [*self._servers, *self._children]]
        write_status(self._state_dir, [line for line in lines if line is not None])


def stop_leftovers(state_dir: Path) -> list[str]:
    """Stop what a killed supervisor left running under ``state_dir``; returns the names. Services before servers."""
    stopped = []
    for left in reversed(read_status(state_dir)):
        if left.identity().alive():
            stop_stranger(left.identity(), left.signal(), 15.0)
            stopped.append(left.name)
    if stopped:
        log.warning("stopped_leftovers", processes=stopped)
    write_status(state_dir, [])
    withdraw(state_dir)
    return stopped


def _started(server: PrivatePostgres | PrivateValkey) -> ServerProcess:
    server.start()
    return server.process


def _listen_address(settings: Settings) -> str:
    """Where the gateway shall listen: as configured (port 0: any free one), else the default if nobody has it."""
    host, _, port = (settings.configured_grpc_address or DEFAULT_GRPC_ADDRESS).rpartition(":")
    if port == "0":
        return f"{host}:{free_port()}"
    if port_is_free(host, int(port)):
        return f"{host}:{port}"
    if settings.configured_grpc_address:
        raise ServerNotStarted(f"{host}:{port} is in use; set BYLINE_GRPC_ADDRESS to another (port 0: any free one)")
    return f"{host}:{free_port()}"


@contextmanager
def _only_one(state_dir: Path) -> Iterator[None]:
    """Hold the state directory's lock; the kernel drops it with the process, however that ends."""
    with (state_dir / LOCK_FILE).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServerNotStarted(f"another supervisor runs under {state_dir}", state_dir=state_dir) from None
        yield


