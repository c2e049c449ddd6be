"""Which old releases' files may go, and their removal: mark the row, hide the folder, delete it.

Why it exists: every refresh writes gigabytes. What answers, what a rollback would bring back, what a job in flight or a
worker that could not swap still uses is never touched; of the rest the newest few stay. A row stays for ever: it
explains the answers its release gave. The mark comes first, in one transaction with the check, so that an activation
either comes before it and is kept, or after it and is refused; a kill at any moment leaves work that the next
collection finishes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy import Connection, Engine, text

from byline.db.session import transaction
from byline.failpoints import failpoint
from byline.releases.garbage_files import YOUNG_S, abandoned, remove_release, remove_tree
from byline.releases.registry import ReleaseRecord, ReleaseRegistry, ReleaseState
from byline.telemetry import get_logger

log = get_logger(__name__)

#: A worker silent for longer is dead, and holds nothing.
_SILENT_S = 300
# A job's pin counts as long as the job lives; a worker's, as long as it is heard of.
_IN_USE = text("""
SELECT DISTINCT release_id FROM jobs
WHERE release_id IS NOT NULL AND model_id = :model AND state IN ('QUEUED', 'RUNNING', 'CANCELLING')
UNION
SELECT unnest(ARRAY[w.release_id, w.loading]) FROM worker_releases w JOIN worker_reports r USING (worker_id)
WHERE w.model_id = :model AND r.last_seen > now() - make_interval(secs => :silent)
UNION
SELECT release_id FROM worker_reports
WHERE release_id IS NOT NULL AND last_seen > now() - make_interval(secs => :silent)
""")
_MARK = text("UPDATE releases SET collected_at = now() WHERE id = :id AND collected_at IS NULL")


@dataclass(frozen=True)
class KeepRule:
    """``newest`` releases that could answer stay whatever their age, and every release younger than ``age``.

    Refused candidates are there to be looked at and go after ``age``.
    """

    newest: int = 3
    age: timedelta = timedelta(days=7)


@dataclass(frozen=True)
class Kept:
    """A release that stays, and why."""

    release_id: str
    why: str


@dataclass(frozen=True)
class GarbagePlan:
    """What stays and what goes; ``leftovers`` are folders no release lives in."""

    keep: tuple[Kept, ...]
    remove: tuple[str, ...]
    leftovers: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Collected:
    """A plan that was carried out: ``freed`` bytes, and the releases whose files went."""

    plan: GarbagePlan
    removed: tuple[str, ...]
    freed: int


def plan_garbage(
    records: Sequence[ReleaseRecord], answering: Mapping[str, str], in_use: Collection[str], now: datetime,
    rule: KeepRule,
) -> GarbagePlan:  # fmt: skip
    """Decide. ``answering`` names the releases that must stay and why (active, previous); ``in_use`` are pinned."""
    keep: list[Kept] = []
    remove: list[str] = []
    able = (ReleaseState.ACTIVE, ReleaseState.RETIRED, ReleaseState.VALIDATED)
    newest = 0
    for record in sorted(records, key=lambda one: (one.created_at, one.release_id), reverse=True):
        if record.collected_at is not None:
            continue
        newest += record.state in able
        if record.release_id in answering:
            keep.append(Kept(record.release_id, answering[record.release_id]))
        elif record.state is ReleaseState.ACTIVE:
            keep.append(Kept(record.release_id, "active"))
        elif record.release_id in in_use:
            keep.append(Kept(record.release_id, "used by a job or a worker"))
        elif now - record.created_at < rule.age:
            keep.append(Kept(record.release_id, f"younger than {rule.age}"))
        elif record.state in able and newest <= rule.newest:
            keep.append(Kept(record.release_id, f"one of the newest {rule.newest}"))
        else:
            remove.append(record.release_id)
    return GarbagePlan(tuple(keep), tuple(remove))


def in_use(connection: Connection, model_id: str) -> set[str]:
    """The releases of a model that a live job is pinned to, or that a worker serves or loads."""
    return set(connection.execute(_IN_USE, {"model": model_id, "silent": _SILENT_S}).scalars()) - {None}


class GarbageCollector:
    """Collects the releases of one release folder, model by model."""

    def __init__(self, engine: Engine, root: Path, rule: KeepRule, young_s: float = YOUNG_S) -> None:
        """``young_s``: a folder that is being built is left alone for so long, whoever builds it."""
        self._engine = engine
        self._root = root
        self._rule = rule
        self._young_s = young_s
        self._registry = ReleaseRegistry(engine)

    def plan(self, model_id: str, now: datetime) -> GarbagePlan:
        """What :meth:`collect` would do now; changes nothing."""
        with transaction(self._engine) as connection:
            found = self._plan(connection, model_id, now)
        leftovers = tuple(abandoned(self._root, self._young_s)) if self._root.is_dir() else ()
        return GarbagePlan(found.keep, found.remove, leftovers)

    def collect(self, model_id: str, now: datetime) -> Collected:
        """Remove what may go, and what an interrupted collection left. Raises DatabaseUnavailable and OSError."""
        plan = self.plan(model_id, now)
        freed, removed = 0, []
        for release_id in plan.remove:
            if self._mark(model_id, release_id, now):
                removed.append(release_id)
                failpoint("releases.gc_after_mark")
        for record in self._registry.list(model_id, limit=1_000_000):
            if record.collected_at is not None and record.directory.exists():
                freed += remove_release(record.directory)
                failpoint("releases.gc_before_done")
        for folder in plan.leftovers:
            freed += remove_tree(folder)
        if removed or plan.leftovers:
            log.info("releases_collected", model_id=model_id, releases=removed, leftovers=len(plan.leftovers),
                     freed_mb=round(freed / 1e6, 1))
        return Collected(plan, tuple(removed), freed)

    def _plan(self, connection: Connection, model_id: str, now: datetime) -> GarbagePlan:
        active = self._registry.active_within(connection, model_id)
        answering: dict[str, str] = {}
        if active is not None:
            if active.previous_release_id is not None:
                answering[active.previous_release_id] = "previous: a rollback brings it back"
            answering[active.release_id] = "active"
        records = self._registry.list_within(connection, model_id)
        return plan_garbage(records, answering, in_use(connection, model_id), now, self._rule)

    def _mark(self, model_id: str, release_id: str, now: datetime) -> bool:
        """Under the lock that activations take: is it still to go?"""
        with transaction(self._engine) as connection:
            self._registry.lock_within(connection, model_id)
            if release_id not in self._plan(connection, model_id, now).remove:
                return False
            return bool(connection.execute(_MARK, {"id": release_id}).rowcount)

