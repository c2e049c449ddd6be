"""Engines and transactions, and the one place where a lost database becomes a typed error.

Why it exists: every service opens Postgres the same way (psycopg 3, UTC, stale connections replaced), and
a caller sees ``DatabaseUnavailable`` instead of a driver's exception when the server is away.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import InterfaceError, InvalidatePoolError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from byline.errors import DatabaseUnavailable

__all__ = ["Session", "database_time", "database_url", "make_engine", "single_statements", "transaction"]


#: A link that is cut says nothing. Without these a heartbeat would wait a quarter of an hour for an answer that will
#: not come, and a listener two hours for news. Seconds, but the last: milliseconds.
LINK: Mapping[str, Any] = {
    "keepalives_idle": 30, "keepalives_interval": 5, "keepalives_count": 4, "tcp_user_timeout": 30_000,
}  # fmt: skip
#: A connection unused for so long (seconds) is checked before it is given out.
CHECK_AFTER_S = 1.0


def database_url(url: str) -> URL:
    """``url`` with the psycopg 3 driver named, whatever form the operator wrote it in."""
    parsed = make_url(url)
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    return parsed


def make_engine(
    url: str, pool_size: int = 10, *, application: str = "byline", statement_timeout_s: float = 0.0
) -> Engine:
    """A pooled engine. A connection unused for a second is checked first, so a restarted Postgres costs one reconnect
    (or one ``DatabaseUnavailable`` where work was under way).

    ``pool_size`` is the most connections this process holds; waiting for a free one ends after 10 s with
    ``DatabaseUnavailable`` (inside ``transaction``), and so does a statement after ``statement_timeout_s`` (0: after
    whatever the server says).
    """
    bounded = f" -c statement_timeout={round(1e3 * statement_timeout_s)}" if statement_timeout_s else ""
    engine = create_engine(
        database_url(url),
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=10,
        pool_use_lifo=True,  # the connection used last: the warm one, and the one that need not be checked
        hide_parameters=True,  # a prompt must not reach a log through a database error's message
        connect_args={
            "connect_timeout": 5,
            "application_name": application,
            "options": "-c timezone=UTC" + bounded,
            **LINK,
        },
    )
    event.listen(engine, "checkin", _returned)
    event.listen(engine, "checkout", partial(_check, engine))
    return engine


def _returned(_connection: DBAPIConnection | None, record: ConnectionPoolEntry) -> None:
    record.info["returned"] = time.monotonic()


def _check(engine: Engine, connection: DBAPIConnection, record: ConnectionPoolEntry, _proxy: object) -> None:
    """Ping a connection that lay unused: one that is always checked costs a lookup four round trips more."""
    returned = record.info.get("returned")
    if returned is None or time.monotonic() - returned < CHECK_AFTER_S:
        return
    try:
        engine.dialect.do_ping(connection)
    except engine.dialect.loaded_dbapi.Error as error:
        raise InvalidatePoolError("the server closed its connections") from error


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """One transaction: commits on leaving, rolls back on any exception.

    Raises ``DatabaseUnavailable`` if Postgres cannot be reached, went away in the middle, or chose this
    transaction to end a deadlock; in each case nothing was committed, or the commit's fate is unknown and
    the caller's operation is safe to repeat.
    """
    with _typed(), engine.begin() as connection:
        yield connection


def database_time(engine: Engine) -> datetime:
    """The present time by the database's clock, in UTC: machines need not agree on theirs. DatabaseUnavailable."""
    with transaction(engine) as connection:
        found: datetime = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
    return found.astimezone(UTC)


@contextmanager
def single_statements(engine: Engine) -> Iterator[Connection]:
    """Each statement is a transaction of its own: for reading, or for one statement that says it all.

    Two round trips fewer than ``transaction``. Raises ``DatabaseUnavailable`` as it does.
    """
    with _typed(), engine.connect() as connection:
        yield connection.execution_options(isolation_level="AUTOCOMMIT")


@contextmanager
def _typed() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeout) as error:
        raise DatabaseUnavailable(
            "the database cannot be reached; try again", cause=type(error.__cause__ or error).__name__
        ) from error
