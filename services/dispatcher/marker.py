"""Notices that Redis lost its contents.

Why it exists: a wiped or replaced Redis answers like a healthy one. A key of our own that is gone says that
the messages are gone too, within one poll, where waiting for every doorbell to grow old takes minutes.
"""

from __future__ import annotations

import redis

from byline.errors import BrokerUnavailable
from byline.queue import PUBLISH_TIMEOUT_S

KEY = "byline:dispatcher:marker"


class RedisMarker:
    """A key without expiry in the broker's database."""

    def __init__(self, redis_url: str) -> None:
        self._client = redis.Redis.from_url(
            redis_url, socket_timeout=PUBLISH_TIMEOUT_S, socket_connect_timeout=PUBLISH_TIMEOUT_S
        )

    def is_new(self) -> bool:
        """Whether the key was missing; sets it, so of several dispatchers one is told. Raises ``BrokerUnavailable``."""
        try:
            return bool(self._client.set(KEY, b"1", nx=True))
        except (redis.RedisError, OSError) as error:
            raise BrokerUnavailable("Redis cannot be reached", cause=type(error).__name__) from error

    def close(self) -> None:
        """Give the connection back."""
        self._client.close()
