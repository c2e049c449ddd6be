"""What happened in a chaos run, as plain values that can be kept in a file and judged by anybody.

Why it exists: a run that only says "passed" cannot be questioned. The history holds both sides: what clients were told
(acknowledgements, answers, withdrawals; seconds by one monotonic clock, the driver's) and what Postgres holds (rows,
changes of state, results). The checker reads nothing else. JSON lines, gzipped; no picture, prompt or
vector is in it.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """A client was told that the job of this request exists."""

    request: str
    project: str
    job: str
    at: float


@dataclass(frozen=True, slots=True)
class JobFacts:
    """A row of ``jobs`` at the end."""

    job: str
    project: str
    request: str
    kind: str
    tier: str
    state: str
    release: str | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """A row of ``job_events``; a job's changes stand in their order."""

    job: str
    before: str | None
    after: str
    stage: str
    actor: str
    fence: int
    reason: str


@dataclass(frozen=True, slots=True)
class Result:
    """A row of ``job_results``: ``names_release`` is the release its JSON says, ``items`` what it names."""

    job: str
    stage: str
    release: str | None
    fence: int
    names_release: str | None
    items: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Read:
    """An answer as a client saw it, when its call began, and when the answer was there; ``how``: the method called."""

    job: str
    tier: str
    release: str
    items: tuple[int, ...]
    began: float
    ended: float
    how: str = "get"


@dataclass(frozen=True, slots=True)
class Watched:
    """The states that one watch of a job showed, in their order; ``ended``: it ended by itself."""

    job: str
    states: tuple[str, ...]
    ended: bool


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """A client was told that this item is withdrawn."""

    item: int
    acknowledged: float


@dataclass(frozen=True, slots=True)
class Fault:
    """What was done to the system, and when. ``kills``: processes that were sent SIGKILL."""

    name: str
    began: float
    ended: float
    kills: int = 0
    note: str = ""


Entry = Acknowledged | JobFacts | Change | Result | Read | Watched | Withdrawn | Fault
_KINDS: Mapping[str, type[Any]] = {
    kind.__name__: kind for kind in (Acknowledged, JobFacts, Change, Result, Read, Watched, Withdrawn, Fault)
}


@dataclass(frozen=True)
class History:
    """Everything the checker may look at."""

    acknowledged: tuple[Acknowledged, ...] = ()
    jobs: tuple[JobFacts, ...] = ()
    changes: tuple[Change, ...] = ()
    results: tuple[Result, ...] = ()
    reads: tuple[Read, ...] = ()
    withdrawn: tuple[Withdrawn, ...] = ()
    faults: tuple[Fault, ...] = ()
    watched: tuple[Watched, ...] = ()
    #: The items of each release: an answer with an item that its release does not hold is from two releases.
    release_items: Mapping[str, frozenset[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Iterable[Entry], release_items: Mapping[str, Iterable[int]]) -> History:
        """Sort entries by their kind, keeping their order."""
        lists: dict[type[Any], list[Any]] = {kind: [] for kind in _KINDS.values()}
        for entry in entries:
            lists[type(entry)].append(entry)
        return cls(
            tuple(lists[Acknowledged]), tuple(lists[JobFacts]), tuple(lists[Change]), tuple(lists[Result]),
            tuple(lists[Read]), tuple(lists[Withdrawn]), tuple(lists[Fault]),
            tuple(lists[Watched]),
            {release: frozenset(items) for release, items in release_items.items()},
        )  # fmt: skip

    def entries(self) -> Iterable[Entry]:
        """All entries, kind by kind."""
        for part in (
            self.faults, self.withdrawn, self.acknowledged, self.jobs, self.changes, self.results, self.reads,
            self.watched,
        ):  # fmt: skip
            yield from part

    def write(self, path: Path) -> None:
        """Keep it: one JSON line an entry, gzipped, the same bytes for the same history."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as out:
            items = {release: sorted(found) for release, found in sorted(self.release_items.items())}
            out.write((json.dumps({"entry": "Releases", "items": items}) + "\n").encode())
            for entry in self.entries():
                line = {"entry": type(entry).__name__, **asdict(entry)}
                out.write((json.dumps(line, separators=(",", ":")) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> History:
        """The inverse of ``write``."""
        entries: list[Entry] = []
        releases: Mapping[str, Iterable[int]] = {}
        with gzip.open(path, "rt") as lines:
            for line in lines:
                values = json.loads(line)
                kind = values.pop("entry")
                if kind == "Releases":
                    releases = values["items"]
                    continue
                for name in ("items", "states"):
                    if name in values:
                        values[name] = tuple(values[name])
                entries.append(_KINDS[kind](**values))
        return cls.of(entries, releases)
