"""Which workers live, and which of them an operator drains.

Why it exists: draining is a row that the worker itself looks for (``services.workers.drain``), so it works across
machines and while Redis is away, and it is seen here by whoever looks next. Synchronous; runs on the gateway's pool.
"""

from __future__ import annotations

from sqlalchemy import Connection, Engine, RowMapping, text

from attribution.v1 import operator_service_pb2 as wire
from byline.db.session import transaction
from byline.errors import WorkerNotFound
from services.gateway import convert

#: A worker silent for longer than this is not listed.
SILENT = "5 minutes"

# A drain is of the worker, whatever child process it has just now.
_WORKERS = f"""
SELECT w.worker_id, w.queue, w.release_id, w.error, w.started_at, w.last_seen, d.asked_at, d.drained_at
FROM worker_reports w LEFT JOIN worker_drains d ON d.worker = regexp_replace(w.worker_id, ':[0-9]+$', '')
WHERE w.last_seen > now() - interval '{SILENT}'
"""  # noqa: S608
_LISTED = text(f"{_WORKERS} ORDER BY w.worker_id")
_ONE = text(f"{_WORKERS} AND w.worker_id = :id")
_DRAIN = text(
    "INSERT INTO worker_drains (worker, reason) VALUES (regexp_replace(:id, ':[0-9]+$', ''), :reason)"
    " ON CONFLICT (worker) DO UPDATE SET reason = excluded.reason"
)
_RESUME = text("DELETE FROM worker_drains WHERE worker = regexp_replace(:id, ':[0-9]+$', '')")
#: Wishes about workers that are gone for good: nobody will ask for them again.
_FORGET = text(
    "DELETE FROM worker_drains d WHERE asked_at < now() - interval '7 days'"
    " AND NOT EXISTS (SELECT 1 FROM worker_reports w WHERE regexp_replace(w.worker_id, ':[0-9]+$', '') = d.worker)"
)


def workers(connection: Connection) -> list[wire.Worker]:
    """The workers that were heard of lately."""
    return [_worker(row) for row in connection.execute(_LISTED).mappings()]


def drain(engine: Engine, worker_id: str, reason: str) -> wire.Worker:
    """Ask a worker to take no new work. Asking again changes the reason only. Raises ``WorkerNotFound``."""
    with transaction(engine) as connection:
        _require(connection, worker_id)
        connection.execute(_FORGET)
        connection.execute(_DRAIN, {"id": worker_id, "reason": reason})
        return _require(connection, worker_id)


def resume(engine: Engine, worker_id: str) -> wire.Worker:
    """Let a worker take work again. Raises ``WorkerNotFound``."""
    with transaction(engine) as connection:
        connection.execute(_RESUME, {"id": worker_id})
        return _require(connection, worker_id)


def _require(connection: Connection, worker_id: str) -> wire.Worker:
    row = connection.execute(_ONE, {"id": worker_id}).mappings().first()
    if row is None:
        raise WorkerNotFound(
            f"no live worker is called {worker_id[:200]}; `byline admin workers` lists them", worker_id=worker_id[:200]
        )
    return _worker(row)


def _worker(row: RowMapping) -> wire.Worker:
    return wire.Worker(
        worker_id=row["worker_id"], queue=row["queue"], release_id=row["release_id"] or "", error=row["error"] or "",
        start_time=convert.timestamp(row["started_at"]), last_seen_time=convert.timestamp(row["last_seen"]),
        draining=row["asked_at"] is not None, drained_time=convert.timestamp(row["drained_at"]),
    )  # fmt: skip
