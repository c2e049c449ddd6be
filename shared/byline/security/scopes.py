"""What a key may be allowed to do, and who is calling.

Why it exists: a scope is a promise to a person who hands out keys, so there are few, and each is explained here. Which
method needs which is the gateway's table (``services/gateway/access.py``).
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum


class Scope(StrEnum):
    """One permission."""

    #: Ask: create, cancel and delete jobs, upload images.
    JOBS_WRITE = "jobs:write"
    #: Read jobs, their answers and query images.
    JOBS_READ = "jobs:read"
    #: See models, corpus items and their images.
    CATALOG_READ = "catalog:read"
    #: Change what can be attributed: add and withdraw items.
    CATALOG_WRITE = "catalog:write"
    #: Look at queues, workers, releases, dead jobs, labels and drift.
    OPERATE_READ = "operate:read"
    #: Act on them: activate, roll back, pause, drain, retry, set budgets.
    OPERATE = "operate"


#: A key of one project may hold these; the others reach beyond a project.
PROJECT_SCOPES = frozenset({Scope.JOBS_WRITE, Scope.JOBS_READ, Scope.CATALOG_READ})
ALL_SCOPES = frozenset(Scope)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls: ``name`` stands in the audit. ``project_id`` None: any project (an operator)."""

    name: str
    project_id: str | None
    scopes: frozenset[Scope]
    #: Calls a second of this key and of its project; None: the server's default.
    rate_per_second: float | None = None
    project_rate_per_second: float | None = None


#: Everybody, where no keys are asked for, and whoever works on the machine itself.
LOCAL = Principal("local", None, ALL_SCOPES)

_current: ContextVar[Principal] = ContextVar("byline_principal", default=LOCAL)


def current_principal() -> Principal:
    """Who made the call that is being served; ``LOCAL`` outside of calls."""
    return _current.get()


def set_current(principal: Principal) -> None:
    """Say who made the call of this task (a task of its own for each call, so nothing is to be undone)."""
    _current.set(principal)
