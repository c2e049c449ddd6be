"""One chaos run: start everything, attack it while clients ask, let it come to rest, judge the history.

Why it exists: the order of these steps is what a result means. Each fault is done at least once, and every one of them
while requests come in; then everything must end by itself, every answer is read once more, and the checker is asked.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from byline.chaos.build import TinyWorld
from byline.chaos.checker import Verdict, check
from byline.chaos.collect import collect, with_deltas
from byline.chaos.faults import FAILED, Attack, faults, inject
from byline.chaos.history import Fault, History
from byline.chaos.load import Load
from byline.chaos.plan import Ask
from byline.chaos.system import System
from byline.errors import BylineError, InvalidRequest
from byline.telemetry import get_logger

log = get_logger("byline.chaos")

#: How long jobs may take to end after the last fault.
REST_WITHIN_S = 1800.0


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: its history, the verdict, and figures for people."""

    history: History
    verdict: Verdict
    figures: Mapping[str, Any]


def attack(
    system: System, world: TinyWorld, asks: Sequence[Ask], *, seed: int, lease_s: float, model_id: str, corpus_id: str,
    only: Sequence[str] = (), rounds: int = 1, rest_within_s: float = REST_WITHIN_S,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:  # fmt: skip
    """Run the plan against a system that is up. ``only`` these faults, each ``rounds`` times in a shuffled order.

    Raises InvalidRequest for a fault that does not exist, and whatever breaks the load.
    """
    rng = random.Random(seed)
    load = Load(system.address, world, asks, corpus_id=corpus_id, model_id=model_id, clock=clock)
    common = sorted(frozenset.intersection(*world.release_items.values()))
    attacker = Attack(system, load, rng, model_id, lease_s, common, sorted(world.release_items))
    known = faults(attacker)
    if unknown := set(only) - set(known):
        raise InvalidRequest("faults", f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    chosen: list[str] = []
    for _ in range(rounds):
        chosen += rng.sample(list(only or known), len(only or known))
    begun = clock()
    done: list[Fault] = []
    load.start()
    load.allow(1 / (4 * len(chosen)))
    system.until(lambda: load.acknowledged or load.finished, "the first acknowledgement", rest_within_s)
    for number, name in enumerate(chosen, start=1):
        load.allow(number / len(chosen))
        log.info("attacking", fault=name, number=number, of=len(chosen), acknowledged=len(load.acknowledged))
        done.append(inject(name, known[name], clock))
        system.tend()
    attacked = clock()
    system.until(lambda: load.finished, "the end of the load", rest_within_s)
    load.join()
    stuck = _come_to_rest(system, rest_within_s)
    rested = clock()
    load.read_all()
    entries = [*load.entries, *done, *collect(system.engine)]
    history = History.of(entries, with_deltas(system.engine, world.release_items))
    verdict = check(history)
    figures = _figures(system, load, history, verdict) | {
        "seconds_attacked": round(attacked - begun, 1), "seconds_to_rest": round(rested - attacked, 1),
        "seconds_read": round(clock() - rested, 1), "live_at_the_end": stuck,
    }  # fmt: skip
    return Outcome(history, verdict, figures)


def _come_to_rest(system: System, within_s: float) -> int:
    """Wait until no client's job is live; returns how many still are when patience ends (the checker will say so)."""
    try:
        system.until(lambda: system.live_jobs() == 0, "the end of all jobs", within_s)
    except BylineError:
        return system.live_jobs()
    return 0


def _figures(system: System, load: Load, history: History, verdict: Verdict) -> dict[str, Any]:
    seen = Counter((job.kind, job.tier, job.state) for job in history.jobs)
    reasons = Counter(str(job.reason) for job in history.jobs if job.state == "FAILED")
    return {
        "jobs": len({told.job for told in history.acknowledged}),
        "kills": sum(fault.kills for fault in history.faults),
        "lost": verdict.broken(1, 5), "duplicated": verdict.broken(3), "mixed": verdict.broken(6),
        "withdrawn_seen": verdict.broken(7), "ended_twice": verdict.broken(2), "stale_writes": verdict.broken(4),
        "passed": verdict.passed,
        "violations": [f"{one.promise}: {one.job}: {one.how}" for one in verdict.violations[:50]],
        "rows": len(history.jobs), "changes": len(history.changes), "results": len(history.results),
        "answers_read": len(history.reads), "answers_by": dict(Counter(read.how for read in history.reads)),
        "watches": len(history.watched), "withdrawn": len(history.withdrawn),
        "outcomes": {" ".join(key): count for key, count in sorted(seen.items())},
        "failed_for": dict(reasons),
        "attempts_taken_back": sum(change.reason == "LEASE_EXPIRED" for change in history.changes),
        "claims": sum(change.after == "RUNNING" for change in history.changes),
        "refused_or_failed_calls": dict(load.refusals),
        "faults_failed": sum(fault.note.startswith(FAILED) for fault in history.faults),
        "ended_by_themselves": dict(system.unexpected_ends),
        "faults": [
            {"name": fault.name, "seconds": round(fault.ended - fault.began, 1), "kills": fault.kills,
             "note": fault.note} for fault in history.faults
        ],
    }  # fmt: skip
