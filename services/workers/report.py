"""What a worker tells the fleet view: one row per child, refreshed with a heartbeat.

Why it exists: a swap is done when every live worker serves the new release, and a worker that could not load it
keeps the old one and must be seen to. Operators, ``byline status`` and the swap tests read these rows; no job
ever depends on them, so a lost database connection here is logged and tried again at the next beat.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from byline.telemetry import get_logger

log = get_logger(__name__)

_UPSERT = text(
    """
    INSERT INTO worker_reports (worker_id, service, queue, release_id, loaded_at, error, pid, started_at, last_seen)
    VALUES (:worker_id, :service, :queue, :release_id,
            CASE WHEN CAST(:release_id AS text) IS NULL THEN NULL ELSE now() END, :error, :pid, now(), now())
    ON CONFLICT (worker_id) DO UPDATE SET
        loaded_at = CASE WHEN worker_reports.release_id IS DISTINCT FROM excluded.release_id
                         THEN excluded.loaded_at ELSE worker_reports.loaded_at END,
        release_id = excluded.release_id, error = excluded.error, last_seen = now()
    """
)
_UPSERT_MODEL = text(
    """
    INSERT INTO worker_releases (worker_id, model_id, release_id, loading, error)
    VALUES (:worker_id, :model_id, :release_id, :loading, :error)
    ON CONFLICT (worker_id, model_id) DO UPDATE SET
        release_id = excluded.release_id, loading = excluded.loading, error = excluded.error, since = now()
    WHERE (worker_releases.release_id, worker_releases.loading, worker_releases.error)
        IS DISTINCT FROM (excluded.release_id, excluded.loading, excluded.error)
    """
)
_REMOVE = text("DELETE FROM worker_reports WHERE worker_id = :worker_id")
#: Rows of workers that were killed; a live one beats every few seconds.
_FORGET_DEAD = text("DELETE FROM worker_reports WHERE last_seen < now() - interval '1 day'")


@dataclass(frozen=True)
class WorkerState:
    """What changes in a worker's life: the release it serves, what it could not do, what it is just loading.

    ``models``: the same for each model it answers for; the rest is the configured model's.
    """

    release_id: str | None = None
    error: str | None = None
    loading: str | None = None
    models: Mapping[str, WorkerState] = field(default_factory=dict)


class WorkerReports:
    """Keeps one worker's row in ``worker_reports`` true, from a thread of its own."""

    def __init__(
        self, engine: Engine, worker_id: str, *, queue: str, pid: int, state: Callable[[], WorkerState]
    ) -> None:
        self._engine = engine
        self._state = state
        self._identity = {"worker_id": worker_id, "service": "workers", "queue": queue, "pid": pid}
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def write(self) -> None:
        """Write the row now. Raises SQLAlchemyError when the database cannot be reached."""
        state = self._state()
        with self._engine.begin() as connection:
            connection.execute(_UPSERT, {**self._identity, "release_id": state.release_id, "error": state.error})
            for model_id, of_model in state.models.items():
                connection.execute(_UPSERT_MODEL, {
                    "worker_id": self._identity["worker_id"], "model_id": model_id, "error": of_model.error,
                    "release_id": of_model.release_id, "loading": of_model.loading,
                })  # fmt: skip

    def start(self, every_s: float) -> None:
        """Write the row now and then every ``every_s`` seconds, and whenever ``changed`` is called."""
        self._thread = threading.Thread(target=self._beat, args=(every_s,), name="worker-report", daemon=True)
        self._thread.start()

    def changed(self) -> None:
        """Ask for the row to be written at once."""
        self._wake.set()

    def stop(self) -> None:
        """Stop beating and take the row away: this worker left on purpose."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)
        try:
            with self._engine.begin() as connection:
                connection.execute(_REMOVE, {"worker_id": self._identity["worker_id"]})
        except SQLAlchemyError as error:
            log.warning("worker_report_not_removed", error=str(error))

    def _beat(self, every_s: float) -> None:
        first = True
        while not self._stop.is_set():
            self._wake.clear()
            try:
                self.write()
                if first:
                    with self._engine.begin() as connection:
                        connection.execute(_FORGET_DEAD)
                    first = False
            except SQLAlchemyError as error:
                log.warning("worker_report_not_written", error=str(error))
            self._wake.wait(every_s)
