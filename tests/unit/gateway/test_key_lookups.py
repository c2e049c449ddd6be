"""Bad keys cost one query at a time and a bounded number of audit rows, and good keys pay nothing for them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from byline.errors import BylineError, DatabaseUnavailable
from byline.security.errors import ScopeMissing, Unauthenticated
from byline.security.scopes import Principal, Scope
from services.gateway.guard import Guard
from services.gateway.key_lookups import MOST, KeyLookups

READER = Principal("key:1", "acme", frozenset({Scope.JOBS_READ}))
LIST = "/attribution.v1.AttributionService/ListAttributionJobs"
CREATE = "/attribution.v1.AttributionService/CreateAttributionJob"


class Keys:
    """A table of keys that remembers what it was asked and answers when it is let."""

    def __init__(self, **living: Principal) -> None:
        self.living = living
        self.asked: list[tuple[str, ...]] = []
        self.running = self.most_running = 0
        self.go = asyncio.Event()

    async def find(self, tokens: Sequence[str]) -> dict[str, Principal]:
        self.asked.append(tuple(tokens))
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        living = dict(self.living)  # as a query sees the table: at its beginning
        await self.go.wait()
        self.running -= 1
        return {token: living[token] for token in tokens if token in living}


def test_a_flood_of_bad_keys_is_one_query_at_a_time_and_a_good_key_among_them_is_let_in() -> None:
    async def flood() -> None:
        keys = Keys(good=READER)
        lookups = KeyLookups(keys.find)
        calls = [asyncio.create_task(lookups.principal(f"bad{n}")) for n in range(3 * MOST)]
        good = asyncio.create_task(lookups.principal("good"))
        await asyncio.sleep(0)
        keys.go.set()
        assert await good is READER
        assert {type(found) for found in await asyncio.gather(*calls, return_exceptions=True)} == {Unauthenticated}
        assert keys.most_running == 1 and max(map(len, keys.asked)) <= MOST and len(keys.asked) <= 5

    asyncio.run(flood())


def test_who_asks_while_a_query_runs_is_answered_by_a_later_one() -> None:
    async def revoked_meanwhile() -> None:
        keys = Keys(good=READER)
        lookups = KeyLookups(keys.find)
        before = asyncio.create_task(lookups.principal("good"))
        while not keys.running:
            await asyncio.sleep(0)
        del keys.living["good"]
        after = asyncio.create_task(lookups.principal("good"))
        await asyncio.sleep(0)
        keys.go.set()
        assert await before is READER
        with pytest.raises(Unauthenticated):
            await after

    asyncio.run(revoked_meanwhile())


def test_a_caller_that_gives_up_takes_the_answer_from_nobody_and_a_lost_database_is_told_to_all() -> None:
    async def given_up() -> None:
        keys = Keys(good=READER)
        lookups = KeyLookups(keys.find)
        impatient, patient = (asyncio.create_task(lookups.principal("good")) for _ in range(2))
        while not keys.running:
            await asyncio.sleep(0)
        impatient.cancel()
        keys.go.set()
        assert await patient is READER and keys.asked == [("good",)]

        async def away(tokens: Sequence[str]) -> dict[str, Principal]:
            raise DatabaseUnavailable("away")

        lookups = KeyLookups(away)
        for found in await asyncio.gather(*(lookups.principal(f"k{n}") for n in range(3)), return_exceptions=True):
            assert isinstance(found, DatabaseUnavailable)

    asyncio.run(given_up())


def test_a_flood_of_refusals_is_recorded_up_to_a_rate_counted_beyond_it_and_hides_no_key() -> None:
    recorded: list[dict[str, Any]] = []
    now = 0.0

    class Table:
        def authenticate_all(self, tokens: Sequence[str]) -> dict[str, Principal]:
            return {token: READER for token in tokens if token == "good"}

    class Log:
        def record(self, statement: Any) -> None:
            recorded.append(statement.compile().params)

    async def offload(work: Any, *arguments: Any) -> Any:
        return work(*arguments)

    async def calls() -> None:
        nonlocal now
        guard = Guard(Table(), Log(), offload, clock=lambda: now)  # type: ignore[arg-type]

        async def refused(token: str, method: str, expected: type[BylineError]) -> None:
            with pytest.raises(expected):
                await guard.admit(method, None, [("authorization", f"Bearer {token}")])

        for n in range(150):
            await refused(f"bad{n}", LIST, Unauthenticated)
        assert len(recorded) == 100
        await refused("good", CREATE, ScopeMissing)
        assert (recorded[-1]["principal"], recorded[-1]["detail"]) == ("key:1", {"reason": "SCOPE_MISSING"})
        now = 1.0
        await refused("bad", LIST, Unauthenticated)
        assert recorded[-1]["detail"] == {"reason": "API_KEY_INVALID", "unrecorded": 50}

    asyncio.run(calls())
