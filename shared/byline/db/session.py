"""Engines and transactions, and the one place where a lost database becomes a typed error.

Why it exists: every service opens Postgres the same way (psycopg 3, UTC, stale connections replaced), and
a caller sees ``DatabaseUnavailable`` instead of a driver's exception when the server is away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from byline.errors import DatabaseUnavailable

__all__ = ["Session", "database_url", "make_engine", "single_statements", "transaction"]


def database_url(url: str) -> URL:
    """``url`` with the psycopg 3 driver named, whatever form the operator wrote it in."""
    parsed = make_url(url)
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    return parsed


def make_engine(url: str, pool_size: int = 10, *, application: str = "byline") -> Engine:
    """A pooled engine. Connections are checked before use, so a restarted Postgres costs one reconnect.

    ``pool_size`` is the most connections this process holds; waiting for a free one ends after 10 s with
    ``DatabaseUnavailable`` (inside ``transaction``).
    """
    return create_engine(
        database_url(url),
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=10,
        pool_pre_ping=True,
        hide_parameters=True,  # a prompt must not reach a log through a database error's message
        connect_args={
            "connect_timeout": 5,
            "application_name": application,
            "options": "-c timezone=UTC",
            "keepalives_idle": 30,
        },
    )


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """One transaction: commits on leaving, rolls back on any exception.

    Raises ``DatabaseUnavailable`` if Postgres cannot be reached, went away in the middle, or chose this
    transaction to end a deadlock; in each case nothing was committed, or the commit's fate is unknown and
    the caller's operation is safe to repeat.
    """
    with _typed(), engine.begin() as connection:
        yield connection


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
