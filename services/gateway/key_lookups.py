"""Keys that the gateway does not remember, looked up together: one query at a time, whoever calls.

Why it exists: anybody can send keys that open nothing, so what they cost the database must be bounded; but nobody's
lookup may be refused for it, or strangers could lock out those whose keys are good. A flood makes the queries longer,
never more, and a good key waits for one query more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import islice

from byline.security.keys import refused
from byline.security.scopes import Principal

#: Keys of one query; all of them are found by the primary key.
MOST = 500

Find = Callable[[Sequence[str]], Awaitable[Mapping[str, Principal]]]


class KeyLookups:
    """``find`` tells whose the living ones among some keys are. Belongs to the event loop."""

    def __init__(self, find: Find) -> None:
        self._find = find
        self._waiting: dict[str, asyncio.Future[Principal | None]] = {}
        self._work: asyncio.Task[None] | None = None

    async def principal(self, token: str) -> Principal:
        """Who holds this key, as the database has it after this was asked. Unauthenticated; what ``find`` raises."""
        found = self._waiting.get(token)
        if found is None:
            found = self._waiting[token] = asyncio.get_running_loop().create_future()
        if self._work is None:
            self._work = asyncio.create_task(self._look())
        principal = await asyncio.shield(found)  # others may wait for the same key
        if principal is None:
            raise refused()
        return principal

    async def _look(self) -> None:
        while self._waiting:
            # Taken out before the query begins: who asks later is answered by a later one, so that a key which was
            # revoked in between opens nothing.
            batch = {token: self._waiting.pop(token) for token in list(islice(self._waiting, MOST))}
            try:
                living = await self._find(tuple(batch))
            except Exception as error:
                for future in batch.values():
                    future.set_exception(error)
            else:
                for token, future in batch.items():
                    future.set_result(living.get(token))
        self._work = None
