"""The processes of a chaos run, each a child of this one so that any of them can be killed at any moment.

Why it exists: ``byline up``'s supervisor would hide what a fault does; here the run itself decides what dies and when
it comes back. A service that ends without having been told to is counted and started again, as a supervisor would.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil
from sqlalchemy import Engine, text

from byline.db import make_engine, migrate
from byline.embedded.postgres import PrivatePostgres
from byline.embedded.process import ServerProcess, free_port, kill_tree
from byline.embedded.valkey import PrivateValkey
from byline.errors import ServerNotStarted
from byline.failpoints import VARIABLE
from byline.jobs.states import State
from byline.telemetry import get_logger

T = TypeVar("T")
log = get_logger("byline.chaos")

#: What can be started: the arguments after ``python -m``.
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "gateway": ("services.gateway",),
    "dispatcher": ("services.dispatcher",),
    "lookup": ("services.workers", "lookup"),
    "lookup-2": ("services.workers", "lookup"),
    "verification": ("services.workers", "verification"),
    "curation": ("services.curation",),
    "trainer": ("services.trainer",),
}
#: How long a service may take to come up; a machine that others use needs more than a quiet one.
PATIENCE_S = 300.0


@dataclass
class System:
    """Servers and services under ``root``; ``engine`` looks behind the API.

    Nothing is tied to this process's life by the kernel: that needs code between fork and exec, which crashes now and
    then (SIGSEGV) where gRPC's threads run in the same process. Call ``stop``.
    """

    root: Path
    environment: Mapping[str, str]
    address: str
    engine: Engine
    postgres: PrivatePostgres
    valkey: PrivateValkey
    services: tuple[str, ...] = tuple(COMMANDS)
    processes: dict[str, ServerProcess] = field(default_factory=dict)
    #: Services that are down on purpose: ``tend`` leaves them alone.
    held_down: set[str] = field(default_factory=set)
    #: Ends that no fault asked for, by service.
    unexpected_ends: dict[str, int] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def start(self, name: str, *, failpoints: str = "", clock: tuple[float, float] | None = None) -> None:
        """Start a service by the command an operator uses; with failpoints armed, or with a wrong clock."""
        bent = [] if clock is None else ["byline.chaos.wrong_clock", *map(str, clock)]
        with self._lock:
            self.held_down.discard(name)
            self.processes[name] = ServerProcess.start(
                name, [sys.executable, "-m", *bent, *COMMANDS[name]], log=self.root / f"{name}.log", cwd=self.root,
                environment={**self.environment, **({VARIABLE: failpoints} if failpoints else {})},
            )  # fmt: skip

    def kill(self, name: str) -> int:
        """SIGKILL to a service and its children; returns how many processes that were. It stays down."""
        with self._lock:
            self.held_down.add(name)
            process = self.processes[name]
            victims = 0
            with suppress(psutil.NoSuchProcess):
                victims = 1 + len(psutil.Process(process.identity.pid).children(recursive=True))
            kill_tree(process.identity)
            process.popen.wait()
            process.kill_orphans()
            return victims

    def tend(self) -> None:
        """Start again what ended by itself."""
        with self._lock:
            for name, process in list(self.processes.items()):
                if name in self.held_down or process.running():
                    continue
                process.kill_orphans()
                self.unexpected_ends[name] = self.unexpected_ends.get(name, 0) + 1
                log.warning("ended_by_itself", process=name, status=process.popen.returncode)
                self.start(name)

    def until(self, found: Callable[[], T | None], what: str, patience_s: float = PATIENCE_S) -> T:
        """``found()`` as soon as it is true; what ends by itself meanwhile is started again.

        Raises ServerNotStarted naming ``what`` when it does not become true in time.
        """
        ends = time.monotonic() + patience_s
        pause = threading.Event()
        while not (value := found()):
            if time.monotonic() > ends:
                raise ServerNotStarted(f"{what} did not happen within {patience_s:.0f} s")
            self.tend()
            pause.wait(0.05)
        return value

    def signal(self, name: str, what: signal.Signals, *, children: bool = True) -> None:
        """Send a signal to a service, and to its children too unless told otherwise."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.processes[name].identity.pid)
            for one in [process, *(process.children(recursive=True) if children else ())]:
                with suppress(psutil.NoSuchProcess):
                    one.send_signal(what)

    def pids(self, name: str) -> frozenset[int]:
        """Process ids of a service's children."""
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.processes[name].identity.pid)
            return frozenset(child.pid for child in parent.children(recursive=True))
        return frozenset()

    def ready(self, name: str) -> None:
        """Wait until a worker has reported itself (a lookup worker: with a release), any other until it runs."""
        if name not in ("lookup", "lookup-2", "verification"):
            self.until(lambda: self.processes[name].running(), f"the start of {name}")
            return
        queue = name.removesuffix("-2")

        def reported() -> bool:
            rows = self.rows("SELECT pid, release_id FROM worker_reports WHERE queue = :queue", queue=queue)
            return any(pid in self.pids(name) and (queue != "lookup" or release) for pid, release in rows)

        self.until(reported, f"the start of {name}")

    def holds_a_job(self, name: str) -> bool:
        """Whether a child of this worker holds a claim now."""
        owners = self.rows("SELECT lease_owner FROM jobs WHERE state = :running", running=State.RUNNING)
        return any(owner and int(str(owner).rpartition(":")[2]) in self.pids(name) for (owner,) in owners)

    def rows(self, statement: str, **values: object) -> list[tuple[object, ...]]:
        """Rows of a query, each in a transaction of its own."""
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(text(statement), values)]

    def live_jobs(self) -> int:
        """Jobs of clients that have not ended."""
        statement = "SELECT count(*) FROM jobs WHERE kind = 'attribution' AND end_time IS NULL"
        return int(str(self.rows(statement)[0][0]))

    def stop(self) -> None:
        """Stop everything, gently first; nothing stays behind."""
        with self._lock:
            self.held_down |= set(self.processes)
            for process in self.processes.values():
                if process.running():
                    process.popen.send_signal(signal.SIGCONT)
                    process.popen.send_signal(signal.SIGTERM)
            for process in self.processes.values():
                process.stop(30.0)
                process.kill_orphans()
        self.engine.dispose()
        self.valkey.stop()
        self.postgres.stop()


def start_servers(root: Path) -> System:
    """Postgres (with its settings for safety untouched) and Valkey, migrated and empty; no service runs yet."""
    root.chmod(0o711)  # root's Postgres runs as nobody
    postgres, valkey = PrivatePostgres(root / "postgres"), PrivateValkey(root / "valkey")
    postgres.start()
    try:
        valkey.start()
        migrate(postgres.url)
    except BaseException:
        valkey.stop()
        postgres.stop()
        raise
    address = f"127.0.0.1:{free_port()}"
    return System(root, {}, address, make_engine(postgres.url, 6, application="chaos"), postgres, valkey)


def environment_of(system: System, settings: Mapping[str, str]) -> dict[str, str]:
    """The environment of the services: this one's without its own settings, the servers, and ``settings``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BYLINE_")}
    package = Path(__file__).resolve().parents[3]
    paths = [str(package), str(package / "shared"), str(package / "protos"), kept.get("PYTHONPATH", "")]
    return {
        **kept, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1",
        "BYLINE_DATABASE_URL": system.postgres.url, "BYLINE_REDIS_URL": system.valkey.url,
        "BYLINE_STATE_DIR": str(system.root), "BYLINE_GRPC_ADDRESS": system.address, "BYLINE_LOG_FORMAT": "json",
        **settings,
    }  # fmt: skip
