"""One server process: start it with a log, wait for it, stop it, and know it again after a crash.

Why it exists: Postgres, Valkey and every service are started and stopped the same way, and a stale
process id must never lead to killing somebody else's process; so an id always travels with the time
the process was created.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from byline.errors import ServerNotStarted

_LOG_LIMIT_BYTES = 10 * 1024 * 1024
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class ProcessIdentity:
    """A process id that cannot be confused with a later process of the same id."""

    pid: int
    created: float

    @staticmethod
    def of(pid: int) -> ProcessIdentity | None:
        """The identity of a live process; None if there is none of this id."""
        try:
            return ProcessIdentity(pid, psutil.Process(pid).create_time())
        except psutil.NoSuchProcess:
            return None

    def alive(self) -> bool:
        """Whether exactly this process still runs (a zombie does not)."""
        try:
            process = psutil.Process(self.pid)
            same = abs(float(process.create_time()) - self.created) < 0.05
            return same and str(process.status()) != str(psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False


@dataclass
class ServerProcess:
    """A child of this process, in a session of its own so that Ctrl-C reaches only the supervisor."""

    name: str
    popen: subprocess.Popen[bytes]
    identity: ProcessIdentity
    log: Path
    stop_signal: signal.Signals

    @staticmethod
    def start(name: str, command: list[str], *, log: Path, cwd: Path, stop_signal: signal.Signals = signal.SIGTERM,
              environment: Mapping[str, str] | None = None, die_with_parent: bool = False,
              identity: Mapping[str, Any] | None = None) -> ServerProcess:
        """Start ``command`` with its output appended to ``log``.

        ``identity``: user, group and extra_groups to run as. ``die_with_parent``: the kernel stops it when the
        calling thread dies, however that happens.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.is_file() and log.stat().st_size > _LOG_LIMIT_BYTES:
            log.replace(log.with_suffix(".log.1"))
        arm = None
        if die_with_parent:
            command, arm = _dying_with_parent(command, stop_signal)
        with log.open("ab") as stream:
            popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, cwd=cwd, env=environment,
                start_new_session=True, preexec_fn=arm, **(identity or {}),
            )
        started = ProcessIdentity.of(popen.pid) or ProcessIdentity(popen.pid, time.time())
        return ServerProcess(name, popen, started, log, stop_signal)

    def running(self) -> bool:
        """Whether it has not ended; reaps it if it has."""
        return self.popen.poll() is None

    def stop(self, timeout_s: float) -> None:
        """Ask it to stop, kill it after ``timeout_s``; returns when it is gone."""
        if not self.running():
            return
        self.popen.send_signal(self.stop_signal)
        try:
            self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            kill_tree(self.identity)
            self.popen.wait()

    def kill_orphans(self) -> None:
        """SIGKILL to what it left behind in its process group: the forked child of a worker that was killed would
        otherwise stay, hold memory and be taken for a second worker. Call it only after the process ended."""
        with suppress(ProcessLookupError):
            os.killpg(self.identity.pid, signal.SIGKILL)

    def log_tail(self, lines: int = 20) -> str:
        """The end of its log, for an error message."""
        if not self.log.is_file():
            return ""
        with self.log.open("rb") as stream:
            stream.seek(max(0, self.log.stat().st_size - 16_384))
            return "\n".join(stream.read().decode(errors="replace").splitlines()[-lines:])


def wait_until(ready: Callable[[], bool], timeout_s: float, process: ServerProcess) -> None:
    """Poll ``ready`` until it is true. Raises ServerNotStarted if the process ends first or time runs out."""
    deadline = time.monotonic() + timeout_s
    pause = 0.02
    while not ready():
        if not process.running():
            raise ServerNotStarted(
                f"{process.name} ended with status {process.popen.returncode}:\n{process.log_tail()}", log=process.log
            )
        if time.monotonic() > deadline:
            raise ServerNotStarted(
                f"{process.name} did not answer within {timeout_s:.0f} s:\n{process.log_tail()}", log=process.log
            )
        time.sleep(pause)
        pause = min(0.25, pause * 1.5)  # A server in recovery logs every attempt.


def kill_tree(identity: ProcessIdentity) -> None:
    """SIGKILL to the process and all its descendants (a prefork worker's children hold no lease of their own)."""
    if not identity.alive():
        return
    process = psutil.Process(identity.pid)
    for victim in [*process.children(recursive=True), process]:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue


def stop_stranger(identity: ProcessIdentity, stop_signal: signal.Signals, timeout_s: float) -> None:
    """Stop a process that is not our child: one left behind by a supervisor that was killed."""
    if not identity.alive():
        return
    os.kill(identity.pid, stop_signal)
    deadline = time.monotonic() + timeout_s
    while identity.alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    kill_tree(identity)
    while identity.alive():
        time.sleep(0.02)


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_is_free(host: str, port: int) -> bool:
    """Whether one could listen on ``host:port`` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _dying_with_parent(command: list[str], stop_signal: signal.Signals) -> tuple[list[str], Callable[[], None] | None]:
    """The command that gets ``stop_signal`` when its parent dies, and what the child must run before it, if anything.

    By ``setpriv`` of util-linux where it is. Otherwise by Python between fork and exec, which in a process with many
    threads now and then ends in a crash of the child.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is not None:
        return [setpriv, "--pdeathsig", stop_signal.name.removeprefix("SIG"), "--", *command], None
    libc = ctypes.CDLL(None)  # Looked up before the fork: nothing may be loaded between fork and exec.

    def arm() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(stop_signal))

    return command, arm
