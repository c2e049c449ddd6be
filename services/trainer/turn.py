"""One trainer of a model at a time: whose turn it is, by a lock that Postgres takes back from the dead.

Why it exists: two trainers of one model would fit the same labels twice. The lock only saves that work. What keeps
them from both activating is the compare-and-set of ``registry.activate``: a trainer that lost its connection, or was
stopped for an hour, still holds the epoch it began with, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from byline.db.session import single_statements
from byline.telemetry import get_logger

log = get_logger(__name__)

_TAKE = text("SELECT pg_try_advisory_lock(hashtextextended(:key, 0))")
_GIVE = text("SELECT pg_advisory_unlock(hashtextextended(:key, 0))")


@contextmanager
def my_turn(engine: Engine, model_id: str) -> Iterator[bool]:
    """Whether this trainer may refresh the model now; the lock is held on one connection until the block ends.

    Raises DatabaseUnavailable if it cannot be asked for.
    """
    key = {"key": f"trainer:{model_id}"}
    with single_statements(engine) as connection:
        mine = bool(connection.execute(_TAKE, key).scalar_one())
        try:
            yield mine
        finally:
            if mine:
                try:
                    connection.execute(_GIVE, key)
                except DBAPIError as error:  # the connection is gone, and the lock with it
                    log.warning("turn_lost", model_id=model_id, error=type(error).__name__)
                    connection.invalidate()
