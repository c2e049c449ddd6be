"""Health for load balancers: serving while the database answers.

Why it exists: a gateway without its database can commit nothing and must get no traffic; a gateway without
Redis can, so Redis is not asked. A database that is frozen keeps its connections and says nothing, so it is asked on a
thread that nobody else waits for, and silence counts as an answer. The schema is brought up to date before the server
starts and is not asked again: a newer gateway that migrates it must not take the older ones out of service during a
rolling update. While the server drains it says NOT_SERVING first and closes after.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future

import structlog
from grpc_health.v1 import health, health_pb2
from sqlalchemy import text

from byline.db.session import transaction
from byline.errors import DatabaseUnavailable
from services.gateway.context import GatewayContext

log = structlog.get_logger(__name__)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """Keeps the health servicer's answers true for ``""`` and each service name."""

    def __init__(
        self, context: GatewayContext, services: Sequence[str], every_s: float = 5.0, answers_within_s: float = 3.0
    ) -> None:
        self.servicer = health.aio.HealthServicer()
        self._context = context
        self._names = ("", *services)
        self._every_s = every_s
        self._answers_within_s = answers_within_s
        self._asked: asyncio.Future[bool] | None = None
        self._serving: bool | None = None

    async def watch(self) -> None:
        """Ask the database again and again until cancelled."""
        while True:
            await self._set(await self._database_answers())
            await asyncio.sleep(self._every_s)

    async def drain(self) -> None:
        """Say NOT_SERVING from now on, whatever the database says."""
        await self.servicer.enter_graceful_shutdown()

    async def _set(self, serving: bool) -> None:
        if serving is self._serving:
            return
        self._serving = serving
        log.info("health_changed", serving=serving)
        for name in self._names:
            await self.servicer.set(name, _SERVING if serving else _NOT_SERVING)

    async def _database_answers(self) -> bool:
        if self._asked is None or self._asked.done():
            answer: Future[bool] = Future()
            threading.Thread(target=self._ask, args=(answer,), name="health", daemon=True).start()
            self._asked = asyncio.wrap_future(answer)
        await asyncio.wait([self._asked], timeout=self._answers_within_s)
        return self._asked.done() and self._asked.result()

    def _ask(self, answer: Future[bool]) -> None:
        try:
            with transaction(self._context.engine) as connection:
                connection.execute(text("SELECT 1"))
        except DatabaseUnavailable:
            answer.set_result(False)
        except Exception as error:
            answer.set_exception(error)
        else:
            answer.set_result(True)
