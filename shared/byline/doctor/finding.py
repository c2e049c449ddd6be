"""One finding of the doctor.

Why it exists: a person reads it and a script reads its JSON; both need the same three: how bad, what, what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad a finding is, in rising order."""

    OK = "ok"
    #: Could not be looked at (not installed, not allowed, nothing there yet).
    SKIPPED = "skipped"
    #: Works, but not as well, or not for long.
    WARNING = "warning"
    #: A promise of the system does not hold like this.
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """``check`` names what was looked at; ``advice`` is empty where nothing is to be done."""

    check: str
    level: Level
    found: str
    advice: str = ""


def ok(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check, Level.OK, found)


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level among the findings; OK for none."""
    order = list(Level)
    return max((finding.level for finding in findings), key=order.index, default=Level.OK)
