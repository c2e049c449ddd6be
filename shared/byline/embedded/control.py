"""Bring a system up in the background, wait until it can be used, and bring it down again.

Why it exists: ``byline up``, ``byline down``, the demo and the end-to-end tests do the same things to
a supervisor that runs as a process of its own, and must report the same reasons when it fails.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from byline.config import Settings, as_environment
from byline.embedded.discovery import Servers, discover
from byline.embedded.process import ProcessIdentity, kill_tree
from byline.embedded.services import NAMES
from byline.embedded.status import ProcessStatus, read_status
from byline.embedded.supervisor import stop_leftovers
from byline.errors import ServerNotStarted

#: So many crashes in a row during start-up mean that a service will not come up.
_HOPELESS = 3


def bring_up(settings: Settings, services: Sequence[str] = NAMES, *, timeout_s: float = 120.0,
             report: Callable[[str], None] = lambda message: None) -> Servers:
    """Start the system under ``settings.state_dir``, or find it running, and wait until it can be used.

    "Can be used": every process runs and the gateway says SERVING. Raises ServerNotStarted with the end of the
    log of whatever failed; nothing is left running then.
    """
    supervisor: subprocess.Popen[bytes] | None = None
    if discover(settings.state_dir) is None:
        supervisor = _spawn(settings, services)
    deadline = time.monotonic() + timeout_s
    try:
        return _wait(settings, services, supervisor, deadline, report)
    except (ServerNotStarted, KeyboardInterrupt):
        if supervisor is not None:
            bring_down(settings)
        raise


def bring_down(settings: Settings, timeout_s: float = 60.0) -> bool:
    """Stop the system and wait until it is gone; False when nothing was running."""
    servers = discover(settings.state_dir)
    if servers is None:
        return bool(stop_leftovers(settings.state_dir))
    supervisor = ProcessIdentity(servers.supervisor_pid, servers.supervisor_created)
    os.kill(supervisor.pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while supervisor.alive():
        if time.monotonic() > deadline:
            kill_tree(supervisor)
            break
        time.sleep(0.05)
    stop_leftovers(settings.state_dir)
    return True


def _spawn(settings: Settings, services: Sequence[str]) -> subprocess.Popen[bytes]:
    log = _supervisor_log(settings.state_dir)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "byline.embedded", "--services", ",".join(services)],
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True,
            env={**os.environ, **as_environment(settings), "BYLINE_LOG_FORMAT": "json"},
        )


def _wait(settings: Settings, services: Sequence[str], supervisor: subprocess.Popen[bytes] | None, deadline: float,
          report: Callable[[str], None]) -> Servers:
    state_dir, seen = settings.state_dir, set[str]()
    while True:
        if supervisor is not None and supervisor.poll() is not None:
            raise ServerNotStarted(f"the supervisor ended:\n{_tail(_supervisor_log(state_dir))}")
        running = {process.name for process in read_status(state_dir) if process.state == "running"}
        for name in sorted(running - seen):
            report(f"{name} runs")
        seen |= running
        _give_up_on_crashes(read_status(state_dir))
        servers = discover(state_dir)
        if servers and servers.ready and set(services) <= running:
            if "gateway" not in services or _serving(servers.grpc_address, settings):
                return servers
        if time.monotonic() > deadline:
            last = "the gateway" if servers and servers.ready else "the database"
            missing = sorted(set(services) - running) or [last]
            raise ServerNotStarted(f"not up in time: {', '.join(missing)}; see {state_dir / 'logs'}")
        time.sleep(0.1)


def _give_up_on_crashes(processes: Sequence[ProcessStatus]) -> None:
    for process in processes:
        if process.crashes_in_a_row >= _HOPELESS:
            raise ServerNotStarted(
                f"{process.name} ended {process.crashes_in_a_row} times in a row, last with status "
                f"{process.last_exit}:\n{_tail(Path(process.log))}"
            )


def _serving(address: str, settings: Settings) -> bool:
    """Whether the gateway at ``address`` reports SERVING (health needs no key, but TLS if that is on)."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from byline.client.connection import client_options, open_channel

    with open_channel(address, client_options(settings)["credentials"], "") as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2.0)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _supervisor_log(state_dir: Path) -> Path:
    return state_dir / "logs" / "supervisor.log"


def _tail(log: Path, lines: int = 25) -> str:
    if not log.is_file():
        return f"(no log at {log})"
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 16_384))
        return "\n".join(stream.read().decode(errors="replace").splitlines()[-lines:])
