"""Which programs make up a running system, and when a crashed one is started again.

Why it exists: the list of services and the restart rule are facts worth reading and testing without
starting anything. Services are named as text: ``byline`` never imports them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from byline.errors import InvalidRequest

#: A service that ran this long before it ended is forgiven its earlier crashes.
HEALTHY_AFTER_S = 20.0
FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 15.0


@dataclass(frozen=True)
class Service:
    """One program: its name in status and logs, and the arguments after ``python -m``."""

    name: str
    arguments: tuple[str, ...]

    def command(self) -> list[str]:
        """The command line, with this interpreter."""
        return [sys.executable, "-m", *self.arguments]


SERVICES = (
    Service("gateway", ("services.gateway",)),
    Service("dispatcher", ("services.dispatcher",)),
    Service("lookup", ("services.workers", "lookup")),
    Service("verification", ("services.workers", "verification")),
    Service("curation", ("services.curation",)),
    Service("trainer", ("services.trainer",)),
)
NAMES = tuple(service.name for service in SERVICES)


def chosen(names: Iterable[str]) -> tuple[Service, ...]:
    """The services of these names, in starting order. Raises InvalidRequest for an unknown name."""
    wanted = set(names)
    if unknown := wanted - set(NAMES):
        raise InvalidRequest("services", f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    return tuple(service for service in SERVICES if service.name in wanted)


def restart_delay_s(crashes: int) -> float:
    """Seconds to wait before the start that follows the ``crashes``-th crash in a row (counted from 1)."""
    return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** (crashes - 1))


@dataclass
class CrashCount:
    """How often one process ended in a row without having run well in between."""

    in_a_row: int = 0
    in_all: int = 0

    def ended(self, ran_s: float) -> float:
        """Note an unexpected end after ``ran_s`` seconds; returns the seconds to wait before the next start."""
        self.in_a_row = 1 if ran_s >= HEALTHY_AFTER_S else self.in_a_row + 1
        self.in_all += 1
        return restart_delay_s(self.in_a_row)
