"""What is done to the system, one fault at a time, each leaving it able to recover.

Why it exists: every line of docs/jobs.md about something dying is done here for real: SIGKILL, SIGSTOP, FLUSHALL, a
process killed between two particular statements, a full disk, a wrong clock. A fault returns how many processes it
killed and a note of what it met, so that a run can show that it hit something.
"""

from __future__ import annotations

import random
import resource
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import redis

from byline.chaos.history import Fault
from byline.chaos.load import Load
from byline.chaos.system import System
from byline.embedded.process import kill_tree
from byline.errors import BrokerUnavailable, BylineError, DatabaseUnavailable, ReleaseChanged, ServerNotStarted
from byline.jobs.states import Stage
from byline.queue import enqueue, make_celery
from byline.releases.registry import ReleaseRegistry
from byline.telemetry import get_logger

log = get_logger("byline.chaos")

#: Places between two statements at which a service is killed, and the service that passes them.
FAILPOINTS: Mapping[str, str] = {
    "gateway.before_commit": "gateway",
    "gateway.after_commit": "gateway",
    "dispatcher.after_mark": "dispatcher",
    "dispatcher.after_ring": "dispatcher",
    "dispatcher.after_expiry": "dispatcher",
    "jobs.after_claim": "lookup",
    "jobs.before_complete": "lookup",
    "jobs.in_complete": "verification",
    "jobs.after_complete": "lookup",
}
#: How long a failpoint may wait to be reached; one that is not is noted, and does no harm.
REACHED_WITHIN_S = 90.0
#: How the note of a fault begins that went wrong itself.
FAILED = "failed"


@dataclass
class Attack:
    """What a fault may use: the system, the load it hits, a seeded rng, the model, and the lease's seconds."""

    system: System
    load: Load
    rng: random.Random
    model_id: str
    lease_s: float
    items: Sequence[int] = ()
    releases: Sequence[str] = ("r1", "r2")
    pause: threading.Event = threading.Event()  # noqa: RUF009 - never set: a wait that needs no clock of its own

    # -- processes ------------------------------------------------------------------------------

    def kill(self, name: str) -> tuple[int, str]:
        """SIGKILL to a service and its children, then a start; a worker is met with a job in its hands if one comes."""
        note = ""
        if name in ("lookup", "lookup-2", "verification"):
            held = self._frozen_with_a_job(name)
            note = "with a job in its hands" if held else "idle"
        killed = self.system.kill(name)
        self._wait(self.rng.uniform(0.0, 1.5))
        self.system.start(name)
        self.system.ready(name)
        return killed, note

    def suspend(self, name: str) -> tuple[int, str]:
        """SIGSTOP to a worker until its lease has run out and its job was given away; then it wakes and goes on."""
        held = self._frozen_with_a_job(name)
        self._wait(self.lease_s * 1.6)
        self.system.signal(name, signal.SIGCONT)
        return 0, "with a job in its hands" if held else "idle"

    def deafen(self, name: str) -> tuple[int, str]:
        """SIGSTOP to the process of a worker that consumes, not to the one that computes: it must be noticed."""
        process = self.system.processes[name]
        begun = time.monotonic()
        self.system.signal(name, signal.SIGSTOP, children=False)
        try:
            self.system.until(lambda: self.system.processes[name] is not process, f"notice of a deaf {name}", 120.0)
        except ServerNotStarted:
            self.system.signal(name, signal.SIGCONT, children=False)
            return 0, "not noticed within 120 s"
        self.system.ready(name)
        return 1, f"noticed and replaced within {time.monotonic() - begun:.0f} s"

    def at(self, failpoint: str) -> tuple[int, str]:
        """A service that is killed at a named place, on one of its first passages."""
        name = FAILPOINTS[failpoint]
        killed = self.system.kill(name)
        passage = self.rng.randint(1, 5) if name in ("gateway", "lookup") else 1
        expires = failpoint == "dispatcher.after_expiry" and self._frozen_with_a_job("verification")
        siblings = [other for other in self.system.processes if name == "lookup" and other == "lookup-2"]
        killed += sum(map(self.system.kill, siblings))  # they would take all the work meanwhile
        self.system.start(name, failpoints=f"{failpoint}=kill@{passage}")
        reached = f"failpoint {failpoint}: kill"
        mark = _size(self.system.root / f"{name}.log")
        met = False
        with suppress(ServerNotStarted):
            met = self.system.until(
                lambda: reached in _since(self.system.root / f"{name}.log", mark), failpoint, REACHED_WITHIN_S
            )
        if expires:
            self.system.signal("verification", signal.SIGCONT)
        killed += self.system.kill(name)
        for other in (name, *siblings):
            self.system.start(other)
        self.system.ready(name)
        return killed, f"passage {passage}" if met else "not reached"

    # -- servers --------------------------------------------------------------------------------

    def kill_postgres(self) -> tuple[int, str]:
        """SIGKILL to every process of Postgres, recovery, and on."""
        kill_tree(self.system.postgres.process.identity)
        self.system.postgres.process.popen.wait()
        self._wait(self.rng.uniform(0.0, 3.0))
        self._again(self.system.postgres.start)
        return 1, ""

    def kill_redis(self) -> tuple[int, str]:
        """SIGKILL to Redis; it comes back with what its append-only file holds."""
        kill_tree(self.system.valkey.process.identity)
        self.system.valkey.process.popen.wait()
        self._wait(self.rng.uniform(0.5, 3.0))
        self._again(self.system.valkey.start)
        return 1, ""

    def flush_redis(self) -> tuple[int, str]:
        """Everything Redis holds is gone, three times."""
        client = redis.Redis.from_url(self.system.valkey.url)
        keys = 0
        for _ in range(3):
            keys += int(client.dbsize())
            client.flushall()
            self._wait(self.rng.uniform(0.2, 1.5))
        client.close()
        return 0, f"{keys} keys"

    def freeze_redis(self) -> tuple[int, str]:
        """Redis answers nobody for longer than a lease, and then goes on as if nothing had been."""
        process = self.system.valkey.process.popen
        process.send_signal(signal.SIGSTOP)
        self._wait(self.lease_s * 1.5)
        process.send_signal(signal.SIGCONT)
        return 0, ""

    def freeze_postgres(self) -> tuple[int, str]:
        """Every process of Postgres stands still for longer than a lease."""
        pid = self.system.postgres.process.identity.pid
        import psutil

        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for what in (signal.SIGSTOP, signal.SIGCONT):
            for one in family:
                with suppress(psutil.NoSuchProcess):
                    one.send_signal(what)
            self._wait(self.lease_s * 1.3 if what is signal.SIGSTOP else 0.0)
        return 0, f"{len(family)} processes"

    # -- messages, disk, clock, releases, withdrawals -------------------------------------------

    def ring_thrice(self) -> tuple[int, str]:
        """Three doorbells for each of the latest jobs, ended or not, for each of their stages."""
        app = make_celery(self.system.valkey.url)
        sent = 0
        latest = self.system.rows("SELECT id::text, tier FROM jobs ORDER BY create_time DESC LIMIT 150")
        for job_id, tier in latest * 3:
            for stage in (Stage.LOOKUP, Stage.VERIFY) if tier == "VERIFIED" else (Stage.LOOKUP,):
                with suppress(BrokerUnavailable):
                    enqueue(app, job_id, stage)  # type: ignore[arg-type]
                    sent += 1
        app.close()
        return 0, f"{sent} messages"

    def fill_the_disk(self) -> tuple[int, str]:
        """Until it has tried, the trainer cannot write a longer file than its log: EFBIG, as a full disk's ENOSPC."""
        trainer = self.system.processes["trainer"]
        before = {path.name for path in (self.system.root / "releases").iterdir()}
        limits = resource.prlimit(trainer.identity.pid, resource.RLIMIT_FSIZE)
        log_size = _size(trainer.log)
        most = log_size + 65536  # its own log is a file, too, and may grow
        resource.prlimit(trainer.identity.pid, resource.RLIMIT_FSIZE, (most, limits[1]))
        with suppress(ServerNotStarted):
            self.system.until(lambda: "File too large" in _since(trainer.log, log_size), "a refused write", 60.0)
        with suppress(ProcessLookupError):
            resource.prlimit(trainer.identity.pid, resource.RLIMIT_FSIZE, limits)
        after = {path.name for path in (self.system.root / "releases").iterdir()}
        refused = "File too large" in _since(trainer.log, log_size)
        return 0, f"a write was refused: {refused}; new in releases/: {len(after - before)}"

    def bend_the_clock(self, name: str) -> tuple[int, str]:
        """A worker whose clocks are an hour ahead (or behind) and run half again as fast."""
        killed = self.system.kill(name)
        ahead = self.rng.choice((3600.0, -3600.0))
        self.system.start(name, clock=(ahead, 1.5))
        self.system.ready(name)
        self._wait(5.0)
        return killed, f"{ahead:+.0f} s, 1.5 times as fast, until it is killed"

    def swap_release(self) -> tuple[int, str]:
        """Activate the other release, and after a while the one before."""
        registry = ReleaseRegistry(self.system.engine)
        for _ in range(2):
            active = registry.active(self.model_id)
            other = next(one for one in self.releases if active is None or one != active.release_id)
            with suppress(ReleaseChanged, DatabaseUnavailable):
                registry.activate(self.model_id, other)
            self._wait(4.0)
        return 0, f"answered from {other} last"

    def withdraw(self) -> tuple[int, str]:
        """An item is withdrawn; from its receipt on no answer may name it."""
        item = self.rng.choice(list(self.items))
        self.load.withdraw(item)
        return 0, f"item {item}"

    # -- parts ----------------------------------------------------------------------------------

    def _frozen_with_a_job(self, name: str) -> bool:
        """SIGSTOP to a worker at a moment at which it holds a job; False if none came its way in time."""
        ends = time.monotonic() + 6.0
        while time.monotonic() < ends:
            self.system.signal(name, signal.SIGSTOP)
            if self.system.holds_a_job(name):
                return True
            self.system.signal(name, signal.SIGCONT)
            self._wait(self.rng.uniform(0.0, 0.05))
        self.system.signal(name, signal.SIGSTOP)
        return False

    def _again(self, start: Callable[[], None]) -> None:
        """Start a server, as often as a supervisor would. Raises ServerNotStarted after the third time."""
        for last in (False, False, True):
            try:
                return start()
            except ServerNotStarted as error:
                if last:
                    raise
                log.warning("server_not_started", error=error.message)
        return None

    def _wait(self, seconds: float) -> None:
        self.pause.wait(seconds)


def faults(attack: Attack) -> dict[str, Callable[[], tuple[int, str]]]:
    """Every fault by name, for the services that run."""
    running = attack.system.services
    found: dict[str, Callable[[], tuple[int, str]]] = {}

    def add(name: str, act: Callable[[], tuple[int, str]], *needs: str) -> None:
        if all(need in running for need in needs):
            found[name] = act

    for service in running:
        add(f"{service}_killed", lambda service=service: attack.kill(service))  # type: ignore[misc]
    add("redis_killed", attack.kill_redis)
    add("postgres_killed", attack.kill_postgres)
    add("redis_flushed", attack.flush_redis)
    add("redis_frozen", attack.freeze_redis)
    add("postgres_frozen", attack.freeze_postgres)
    add("messages_thrice", attack.ring_thrice)
    add("lookup_suspended", lambda: attack.suspend("lookup"), "lookup")
    add("verification_suspended", lambda: attack.suspend("verification"), "verification")
    add("lookup_deaf", lambda: attack.deafen("lookup"), "lookup")
    add("verification_deaf", lambda: attack.deafen("verification"), "verification")
    add("disk_full", attack.fill_the_disk, "trainer")
    add("lookup_clock_wrong", lambda: attack.bend_the_clock("lookup-2"), "lookup-2")
    add("verification_clock_wrong", lambda: attack.bend_the_clock("verification"), "verification")
    add("release_swapped", attack.swap_release)
    add("item_withdrawn", attack.withdraw)
    for failpoint, service in FAILPOINTS.items():
        add(f"at {failpoint}", lambda failpoint=failpoint: attack.at(failpoint), service)  # type: ignore[misc]
    return found


def inject(name: str, act: Callable[[], tuple[int, str]], clock: Callable[[], float]) -> Fault:
    """Do it, and say when it was and what it met."""
    began = clock()
    try:
        kills, note = act()
    except BylineError as error:  # one fault that could not be done, or undone in time, must not end the run
        log.exception("fault_failed", fault=name)
        kills, note = 0, f"{FAILED}: {error.message}"
    fault = Fault(name, began, clock(), kills, note)
    log.info("fault", fault=name, seconds=round(fault.ended - began, 1), kills=kills, note=note)
    return fault


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _since(path: Path, start: int) -> str:
    """What was appended to a log since it was ``start`` bytes long."""
    if not path.exists():
        return ""
    with path.open("rb") as stream:
        stream.seek(start)
        return stream.read().decode(errors="replace")
