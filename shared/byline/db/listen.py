"""Hear Postgres notifications for as long as a process lives.

Why it exists: gateways, dispatchers and release holders each keep ONE listening connection and fan its
events out in memory; NOTIFY is lossy across reconnects, so the listener reports every (re)connection and
the caller looks at the tables again. Callers poll slowly beside it and never rely on it for correctness.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import psycopg
import structlog
from psycopg import sql

from byline.db.session import LINK, database_url

log = structlog.get_logger(__name__)

#: Channels and their payloads.
JOBS = "byline_jobs"  # a job's id, after every change of it
QUEUED = "byline_queued"  # a stage, when a job begins to wait for it; "STAGE again" if the job was tried before;
# "STAGE taken" when a job of a slow stage waits no more
ANSWERED = "byline_answered"  # a job's id, when its lookup is over, whatever came of it
RELEASES = "byline_releases"  # a model's id, after every activation
KEYS = "byline_keys"  # an API key's id, when it was made, changed or revoked
WITHDRAWALS = "byline_withdrawals"  # a corpus' id, after every withdrawal
ADDITIONS = "byline_additions"  # a corpus' id, after items were added to it
DELTAS = "byline_deltas"  # a release's id, after its delta grew


class Listener(threading.Thread):
    """A daemon thread that calls ``on_event(channel, payload)`` for each notification.

    ``on_connect()`` is called after every successful (re)connection, when events may have been missed.
    Callbacks run on this thread and must be quick. A lost connection is tried again, first after
    ``retry_s`` seconds, then after twice as long, up to 5 s. ``stop`` ends the thread within ``poll_s``.
    """

    def __init__(
        self,
        url: str,
        channels: Sequence[str],
        stop: threading.Event,
        on_event: Callable[[str, str], None],
        on_connect: Callable[[], None] = lambda: None,
        *,
        retry_s: float = 0.1,
        poll_s: float = 0.5,
    ) -> None:
        super().__init__(name="byline-listener", daemon=True)
        self._conninfo = database_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        self._channels = tuple(channels)
        self._halt = stop
        self._on_event = on_event
        self._on_connect = on_connect
        self._retry_s = retry_s
        self._poll_s = poll_s

    def run(self) -> None:
        """Listen until stopped, reconnecting whenever the connection is lost."""
        delay = self._retry_s
        while not self._halt.is_set():
            try:
                with psycopg.connect(self._conninfo, autocommit=True, connect_timeout=5, **LINK) as connection:
                    for channel in self._channels:
                        connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
                    delay = self._retry_s
                    self._on_connect()
                    self._hear(connection)
            except psycopg.OperationalError as error:
                log.warning("listener_disconnected", error=type(error).__name__, retry_s=delay)
                self._halt.wait(delay)
                delay = min(2 * delay, 5.0)

    def _hear(self, connection: psycopg.Connection) -> None:
        while not self._halt.is_set():
            for event in connection.notifies(timeout=self._poll_s):
                self._on_event(event.channel, event.payload)
                if self._halt.is_set():
                    return
