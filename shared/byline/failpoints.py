"""Named places at which a test may kill, break or delay a process that runs for real.

Why it exists: "kill -9 at any step leaves nothing half-published" can only be tested if a test chooses the step. A
failpoint does nothing unless the environment names it: ``BYLINE_FAILPOINTS="trainer.before_register=kill"``. Every
name stands in ``NAMES``; a program refuses others when it reads its settings, because a test whose failpoint is
misspelt would pass without having killed anything.

``BYLINE_FAILPOINTS`` is ``NAME=ACTION`` pairs with commas between them. Actions: ``kill`` (SIGKILL to this process: no
cleanup runs), ``raise`` (a FailpointReached), ``sleep:SECONDS``. ``ACTION@N`` acts on the Nth passage only, counted
per process.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from byline.errors import SettingsInvalid

VARIABLE = "BYLINE_FAILPOINTS"

#: Every failpoint there is, by program. Add a line where you add a call of :func:`failpoint`.
NAMES = frozenset({
    # services/trainer: one refresh, in this order.
    "trainer.before_snapshot", "trainer.before_fit", "trainer.after_fit", "trainer.before_write",
    "trainer.after_write", "trainer.before_register", "trainer.after_register", "trainer.before_activate",
    "trainer.after_activate",
    # services/gateway: one Create. services/dispatcher: one pass.
    "gateway.before_commit", "gateway.after_commit", "dispatcher.after_mark", "dispatcher.after_ring",
    "dispatcher.after_expiry",
    # byline.jobs: one stage of a job in a worker; ``in_complete`` is inside the transaction that completes it.
    "jobs.after_claim", "jobs.before_complete", "jobs.in_complete", "jobs.after_complete",
    # services/curation: one batch, one client's label, one measure; ``after_queries`` is inside its transaction.
    "curation.after_generate", "curation.after_blobs", "curation.after_queries", "curation.before_commit",
    "curation.after_commit", "curation.intake_before_commit", "curation.intake_after_commit",
    "curation.measure_before_commit", "curation.measure_after_commit",
    # byline.releases.purge: withdrawn items out of rows, then files (a sketch set saved without them, the old one
    # hidden, the new one shown), then old releases, then the receipt closed.
    "corpus.purge_after_rows", "corpus.purge_sketches_saved", "corpus.purge_sketches_hidden",
    "corpus.purge_sketches_shown", "corpus.purge_after_files", "corpus.purge_after_release_mark",
    "corpus.purge_before_mark",
    # byline.releases.builder and byline.releases.garbage.
    "releases.before_rename", "releases.gc_after_mark", "releases.gc_after_hide", "releases.gc_before_done",
})  # fmt: skip

_PAIR = re.compile(
    r"^(?P<name>[a-z0-9_.]+)=(?P<action>kill|raise|sleep:(?P<seconds>\d+(\.\d+)?))(@(?P<nth>[1-9]\d*))?$"
)

_passages: Counter[str] = Counter()
_counting = threading.Lock()


class FailpointReached(RuntimeError):
    """What the action ``raise`` raises: an error that nothing expects."""


@dataclass(frozen=True, slots=True)
class Action:
    """What to do at a failpoint. ``seconds`` of a sleep; ``nth`` passage only, None for every one."""

    kind: str
    seconds: float = 0.0
    nth: int | None = None


def failpoint(name: str) -> None:
    """Act if the environment names this place, else return at once.

    Raises KeyError for a name that is not in ``NAMES``, armed or not, and SettingsInvalid for an environment that
    cannot be read.
    """
    if name not in NAMES:
        raise KeyError(f"failpoint {name} is not listed in byline.failpoints.NAMES")
    armed = os.environ.get(VARIABLE, "")
    if not armed:
        return
    action = parse(armed).get(name)
    if action is None or not _its_turn(name, action):
        return
    print(f"failpoint {name}: {action.kind}", file=sys.stderr, flush=True)
    if action.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action.kind == "raise":
        raise FailpointReached(name)
    time.sleep(action.seconds)


@lru_cache(maxsize=8)
def parse(value: str) -> dict[str, Action]:
    """The actions by name that ``BYLINE_FAILPOINTS`` asks for. SettingsInvalid names every pair that is wrong."""
    actions: dict[str, Action] = {}
    problems: list[str] = []
    for pair in filter(None, (part.strip() for part in value.split(","))):
        found = _PAIR.match(pair)
        if found is None:
            problems.append(f"{pair}: write NAME=kill, NAME=raise or NAME=sleep:SECONDS, with @N for the Nth passage")
        elif found["name"] not in NAMES:
            problems.append(f"{found['name']}: no such failpoint; there are {', '.join(sorted(NAMES))}")
        else:
            nth = int(found["nth"]) if found["nth"] else None
            seconds = float(found["seconds"] or 0.0)
            actions[found["name"]] = Action(found["action"].partition(":")[0], seconds, nth)
    if problems:
        raise SettingsInvalid("\n".join(f"{VARIABLE}: {problem}" for problem in problems))
    return actions


def check_environment() -> None:
    """Refuse, at the start of a program, an environment with unknown failpoints. SettingsInvalid."""
    parse(os.environ.get(VARIABLE, ""))


def _its_turn(name: str, action: Action) -> bool:
    with _counting:
        _passages[name] += 1
        return action.nth is None or _passages[name] == action.nth
