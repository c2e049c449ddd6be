"""Looks whether an operator drains this worker, and stops taking work while that is so.

Why it exists: a worker is drained to be looked at, moved or left idle, which SIGTERM cannot do: whatever started it
would start it again. The wish is a row (``worker_drains``), so it needs no path from the gateway to this machine. What
runs is finished; doorbells are left to other workers by not consuming them; jobs never notice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from sqlalchemy import Engine, text

from byline.db.session import transaction
from byline.errors import DatabaseUnavailable
from byline.telemetry import get_logger

log = get_logger(__name__)

#: Between looks.
POLL_S = 1.0

_ASKED = text("SELECT drained_at IS NOT NULL AS told FROM worker_drains WHERE worker = :worker")
_DRAINED = text("UPDATE worker_drains SET drained_at = now() WHERE worker = :worker AND drained_at IS NULL")


class DrainWatch:
    """A thread that keeps ``draining`` true to the row of ``worker`` until ``stop``.

    ``consume(bool)`` is called at each look with whether doorbells are to be taken: repeating it must be harmless.
    ``idle()`` says whether nothing is being worked on; twice in a row, and the row says that the worker is drained.
    """

    def __init__(
        self, engine: Engine, worker: str, stop: threading.Event, *, idle: Callable[[], bool],
        consume: Callable[[bool], None], poll_s: float = POLL_S,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._worker = worker
        self._stop = stop
        self._idle = idle
        self._consume = consume
        self._poll_s = poll_s
        self._idle_looks = 0
        self.draining = False

    def start(self) -> None:
        """Look once, then again and again on a thread of its own."""
        self._try_to_look()
        threading.Thread(target=self._run, name="drain-watch", daemon=True).start()

    def look(self) -> None:
        """One look. A database that is away changes nothing."""
        try:
            with transaction(self._engine) as connection:
                row = connection.execute(_ASKED, {"worker": self._worker}).first()
                self._idle_looks = self._idle_looks + 1 if row is not None and self.draining and self._idle() else 0
                if row is not None and not row.told and self._idle_looks >= 2:
                    connection.execute(_DRAINED, {"worker": self._worker})
                    log.info("worker_drained", worker=self._worker)
        except DatabaseUnavailable:
            return
        if (row is not None) is not self.draining:
            self.draining = row is not None
            log.info("worker_draining" if self.draining else "worker_resumed", worker=self._worker)
        self._consume(not self.draining)

    def _run(self) -> None:
        while not self._stop.wait(self._poll_s):
            self._try_to_look()

    def _try_to_look(self) -> None:
        try:
            self.look()
        except Exception:  # a database without tables, say: the worker goes on as it was, and the next look comes
            log.exception("drain_not_looked_for", worker=self._worker)
