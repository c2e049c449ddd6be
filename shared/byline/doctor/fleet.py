"""What the doctor asks about the work: who is there to do it, and does it get done?

Why it exists: a system whose servers are well may still have nobody who works.
"""

from __future__ import annotations

from sqlalchemy import Connection, text

from byline.doctor.finding import Finding, Level, ok
from byline.jobs import outbox
from byline.queue import QUEUES

_WORKERS = text("""
SELECT queue, count(*) AS n, count(error) AS failing, min(error) AS error,
    count(*) FILTER (WHERE EXISTS (SELECT 1 FROM worker_drains d
        WHERE d.worker = regexp_replace(worker_id, ':[0-9]+$', ''))) AS draining
FROM worker_reports WHERE last_seen > now() - interval '1 minute' GROUP BY queue
""")
_DEAD = text("""
SELECT count(*) FROM jobs WHERE state = 'FAILED' AND error->>'reason' = 'ATTEMPTS_EXHAUSTED'
    AND error->'metadata'->>'handled' IS NULL
""")


def workers(connection: Connection) -> list[Finding]:
    """Is there at least one live worker of each queue that can work?"""
    found = {row.queue: row for row in connection.execute(_WORKERS)}
    return [_workers(queue, found.get(queue)) for queue in QUEUES]


def _workers(queue: str, row: object) -> Finding:
    check = f"workers.{queue}"
    if row is None:
        return Finding(check, Level.WARNING, "none is alive", f"start one: python -m services.workers {queue}")
    total, failing, draining = int(row.n), int(row.failing), int(row.draining)  # type: ignore[attr-defined]
    shown = f"{total} alive, {failing} with an error, {draining} draining"
    if failing:
        return Finding(check, Level.FAILURE, shown, f"the error: {row.error}")  # type: ignore[attr-defined]
    if draining == total:
        return Finding(check, Level.WARNING, shown, "all of them are drained: `byline admin drain WORKER --undo`")
    return ok(check, shown)


def queues(connection: Connection) -> list[Finding]:
    """Is nothing paused that somebody forgot, and are there no dead jobs nobody dealt with?"""
    findings = []
    for depth in outbox.depths(connection):
        if depth.paused:
            shown = f"paused, {depth.queued} jobs wait"
            findings.append(
                Finding(f"queues.{depth.stage}", Level.WARNING, shown, f"`byline admin resume {depth.stage}`")
            )
    dead = int(connection.execute(_DEAD).scalar_one())
    if dead:
        advice = "`byline admin jobs dead` lists them; retry or discard each"
        findings.append(Finding("queues.dead", Level.WARNING, f"{dead} dead jobs", advice))
    return findings or [ok("queues", "nothing paused, no dead jobs")]
