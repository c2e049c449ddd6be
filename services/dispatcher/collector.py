"""What Postgres, Redis and the disk say of the whole system, as metrics: asked when Prometheus asks.

Why it exists: queue depth and oldest wait are facts of the database, not sums over processes that come and go, and they
are exported by one program (any number of dispatchers export the same; dashboards take the maximum). Asked at each
scrape, they are never stale: while Postgres is away the answer is ``byline_database_up 0`` and no old numbers. What one
slow query would have told is missing alone, and ``byline_scrape_failed`` says so: a Postgres that is slow is not away.
No label names a job, a project or a person.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import redis
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

from byline.db.session import transaction
from byline.errors import DatabaseUnavailable
from byline.jobs import outbox
from byline.jobs.states import Stage
from byline.queue import QUEUES
from byline.telemetry import get_logger

log = get_logger(__name__)

#: A worker silent for longer (seconds) does not count as one; it beats every ``heartbeat_seconds``.
LIVE_S = 60.0
#: A query that hangs is given up after so long (milliseconds) ...
STATEMENT_MS = 2_000
#: ... and all of them together after this many seconds: Prometheus itself gives up after ten.
BUDGET_S = 6.0

#: name -> (help, labels, query giving the labels and then the value). Asked in this order, cheap ones first.
QUERIES: Mapping[str, tuple[str, Sequence[str], str]] = {
    "byline_database_connections": (
        "Connections to Postgres, of all programs", [],
        "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'",
    ),
    "byline_database_connections_limit": (
        "Connections Postgres allows", [],
        "SELECT CAST(setting AS int) FROM pg_settings WHERE name = 'max_connections'",
    ),
    "byline_workers": (
        "Live workers", ["queue"],
        """SELECT q.queue, (SELECT count(*) FROM worker_reports w WHERE w.queue = q.queue
            AND w.last_seen > now() - make_interval(secs => :live))
        FROM unnest(CAST(:queues AS text[])) AS q(queue)""",
    ),
    "byline_workers_with_errors": (
        "Live workers that could not load what they need", ["queue"],
        """SELECT q.queue, (SELECT count(*) FROM worker_reports w WHERE w.queue = q.queue AND w.error IS NOT NULL
            AND w.last_seen > now() - make_interval(secs => :live))
        FROM unnest(CAST(:queues AS text[])) AS q(queue)""",
    ),
    "byline_workers_draining": (
        "Live workers that an operator drains", [],
        """SELECT count(*) FROM worker_reports w
        JOIN worker_drains d ON d.worker = regexp_replace(w.worker_id, ':[0-9]+$', '')
        WHERE w.last_seen > now() - make_interval(secs => :live)""",
    ),
    "byline_release_skew_workers": (
        "Live lookup workers that serve a model from another release than the active one", [],
        """SELECT count(*) FROM worker_reports w WHERE w.queue = 'lookup'
            AND w.last_seen > now() - make_interval(secs => :live) AND EXISTS (SELECT 1 FROM active_releases)
            AND (NOT EXISTS (SELECT 1 FROM worker_releases r WHERE r.worker_id = w.worker_id) OR EXISTS (
                SELECT 1 FROM worker_releases r JOIN active_releases a USING (model_id)
                WHERE r.worker_id = w.worker_id AND r.release_id IS DISTINCT FROM a.release_id))""",
    ),
    "byline_active_release_info": (
        "1 for the active release of a model", ["model_id", "release_id"],
        "SELECT model_id, release_id, 1 FROM active_releases",
    ),
    "byline_active_release_age_seconds": (
        "Time since the active release was made", ["model_id"],
        """SELECT a.model_id, EXTRACT(epoch FROM now() - r.created_at)
        FROM active_releases a JOIN releases r ON r.id = a.release_id""",
    ),
    "byline_release_map": (
        "Held-out mAP of the active release", ["model_id", "release_id"],
        """SELECT a.model_id, a.release_id, CAST(r.metrics->>'map' AS float8)
        FROM active_releases a JOIN releases r ON r.id = a.release_id
        WHERE jsonb_typeof(r.metrics->'map') = 'number'""",
    ),
    "byline_dispatch_lag_seconds": (
        "For how long the oldest due job has had no doorbell", ["stage"],
        """SELECT s.stage, COALESCE((SELECT EXTRACT(epoch FROM now() - min(COALESCE(next_attempt_at, update_time)))
            FROM jobs j WHERE j.stage = s.stage AND j.state = 'QUEUED' AND j.dispatched_at IS NULL
            AND (j.next_attempt_at IS NULL OR j.next_attempt_at <= now())), 0)
        FROM unnest(CAST(:stages AS text[])) AS s(stage)""",
    ),
    "byline_withdrawn_items": (
        "Items that are in no answer any more", ["corpus_id"],
        "SELECT corpus_id, count(*) FROM items WHERE withdrawn_at IS NOT NULL GROUP BY 1",
    ),
    "byline_dead_jobs": (
        "Jobs that used up their attempts and were neither retried nor discarded", ["stage"],
        """SELECT s.stage, count(j.id) FROM unnest(CAST(:stages AS text[])) AS s(stage)
        LEFT JOIN jobs j ON j.stage = s.stage AND j.state = 'FAILED'
            AND j.error->>'reason' = 'ATTEMPTS_EXHAUSTED' AND j.error->'metadata'->>'handled' IS NULL
        GROUP BY s.stage""",
    ),
    "byline_label_set_size": (
        "Queries with a ranking", ["model_id", "split"],
        """SELECT q.model_id, q.split, count(*) FROM queries q
        WHERE EXISTS (SELECT 1 FROM rankings r WHERE r.query_id = q.id) GROUP BY 1, 2""",
    ),
    "byline_label_age_seconds": (
        "Time since the newest ranking", ["model_id"],
        "SELECT model_id, EXTRACT(epoch FROM now() - max(created_at)) FROM rankings GROUP BY 1",
    ),
}


class SystemCollector(Collector):
    """Register it with the process's registry. ``folders`` are watched for room, by name."""

    def __init__(
        self, engine: Engine, redis_url: str, folders: Mapping[str, Path], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._redis: Any = redis.Redis.from_url(redis_url, socket_timeout=2.0, socket_connect_timeout=2.0)
        self._folders = dict(folders)

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not ask the servers."""
        return []

    def collect(self) -> Iterable[Metric]:
        """All of it, as it is now. Never raises for a server that is away."""
        yield from self._guarded("byline_database_up", "Whether Postgres answers", self._of_database)
        yield from self._guarded("byline_redis_up", "Whether Redis answers", self._of_redis)
        yield from self._of_disk()

    def _guarded(self, name: str, help_: str, ask: Callable[[], list[Metric]]) -> Iterable[Metric]:
        up = GaugeMetricFamily(name, help_)
        try:
            found = ask()
        except (DatabaseUnavailable, SQLAlchemyError, redis.RedisError, OSError) as error:
            log.warning("not_collected", what=name, error=type(error).__name__)
            up.add_metric([], 0)
            return [up]
        up.add_metric([], 1)
        return [up, *found]

    def _of_database(self) -> list[Metric]:
        with transaction(self._engine) as connection:
            connection.execute(text("SELECT 1"))
        help_ = "1 for what Postgres did not tell in time, by the name of the metric; byline_jobs: of all by stage"
        failed = GaugeMetricFamily("byline_scrape_failed", help_, labels=["metric"])
        until, found = self._clock() + BUDGET_S, list[Metric]()
        asks: Mapping[str, Callable[[Connection], list[Metric]]] = {
            "byline_jobs": _stages, **{name: partial(_queried, name) for name in QUERIES},
        }  # fmt: skip
        for name, ask in asks.items():
            told = self._told(name, ask, until)
            failed.add_metric([name], float(told is None))
            found += told or []
        return [*found, failed]

    def _told(self, name: str, ask: Callable[[Connection], list[Metric]], until: float) -> list[Metric] | None:
        """In a transaction of its own, so that one that is given up takes no other with it; None: not told in time."""
        left_ms = int(1e3 * (until - self._clock()))
        if left_ms <= 0:
            return None
        try:
            with transaction(self._engine) as connection:
                connection.execute(text(f"SET LOCAL statement_timeout = {min(STATEMENT_MS, left_ms)}"))
                return ask(connection)
        except (DatabaseUnavailable, SQLAlchemyError) as error:
            log.warning("not_collected", what=name, error=type(error).__name__)
            return None

    def _of_redis(self) -> list[Metric]:
        memory = self._redis.info("memory")
        waiting = GaugeMetricFamily("byline_broker_messages", "Doorbells that lie in Redis", labels=["queue"])
        for queue in QUEUES:
            waiting.add_metric([queue], self._redis.llen(f"byline:{queue}"))
        return [
            _single("byline_broker_unacked", "Doorbells a worker holds", self._redis.hlen("byline:unacked")),
            _single("byline_redis_memory_bytes", "Memory Redis uses", memory["used_memory"]),
            _single("byline_redis_memory_limit_bytes", "Memory Redis may use; 0: no limit", memory["maxmemory"]),
            waiting,
        ]

    def _of_disk(self) -> Iterable[Metric]:
        free = GaugeMetricFamily("byline_disk_free_bytes", "Room left where a folder lies", labels=["folder"])
        size = GaugeMetricFamily("byline_disk_size_bytes", "Size of the disk a folder lies on", labels=["folder"])
        for name, folder in self._folders.items():
            if folder.is_dir():
                usage = shutil.disk_usage(folder)
                free.add_metric([name], usage.free)
                size.add_metric([name], usage.total)
        return [free, size]


def _stages(connection: Connection) -> list[Metric]:
    jobs = GaugeMetricFamily("byline_jobs", "Jobs by stage and state", labels=["stage", "state"])
    oldest = GaugeMetricFamily("byline_oldest_queued_seconds", "Age of the oldest waiting job", labels=["stage"])
    paused = GaugeMetricFamily("byline_stage_paused", "1 while an operator pauses the stage", labels=["stage"])
    for depth in outbox.depths(connection):
        stage = depth.stage.value
        jobs.add_metric([stage, "QUEUED"], depth.queued)
        jobs.add_metric([stage, "RUNNING"], depth.running)
        oldest.add_metric([stage], depth.oldest_wait_s)
        paused.add_metric([stage], float(depth.paused))
    return [jobs, oldest, paused]


def _queried(name: str, connection: Connection) -> list[Metric]:
    help_, labels, query = QUERIES[name]
    family = GaugeMetricFamily(name, help_, labels=list(labels))
    parameters = {"stages": [stage.value for stage in Stage], "queues": list(QUEUES), "live": LIVE_S}
    wanted = {key: value for key, value in parameters.items() if f":{key}" in query}
    for row in connection.execute(text(query), wanted):
        family.add_metric([str(value) for value in row[:-1]], float(row[-1]))
    return [family]


def _single(name: str, help_: str, value: float) -> Metric:
    family = GaugeMetricFamily(name, help_)
    family.add_metric([], value)
    return family
