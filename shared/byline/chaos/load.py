"""The clients of a chaos run: they ask, ask again until they are told yes, read answers, withdraw, and note everything.

Why it exists: a promise is made to a client, so the client's side is what counts. Runs on a thread of its own with its
own event loop; the thread that injects faults opens the gate for more requests as it goes on, so that every fault meets
load.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TypeVar

from byline.chaos.build import CORPUS_ID, MODEL_ID, TinyWorld
from byline.chaos.history import Acknowledged, Entry, Read, Watched, Withdrawn
from byline.chaos.plan import PROJECTS, Ask
from byline.client import AsyncClient, Job
from byline.errors import BylineError
from byline.jobs.states import Tier
from byline.telemetry import get_logger

T = TypeVar("T")
log = get_logger("byline.chaos")

#: Items of an answer, and candidates of a verification.
TOP_K, CANDIDATES = 5, 6
#: A job that has not ended by then is the checker's business.
WATCH_S = 1800.0
#: Refusals that say what to do: the release has changed since the question was put together.
_ASK_ANEW = ("RELEASE_NOT_ELIGIBLE", "TIER_NOT_AVAILABLE", "NO_ACTIVE_RELEASE")
_GONE = ("JOB_NOT_FOUND",)
#: INTERNAL: a gateway that is killed in the middle of a call leaves the client with no better word.
_WORTH_ANOTHER_TRY = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "INTERNAL")


@dataclass(frozen=True, slots=True)
class _Question:
    """What a request asks: by an embedding of a release's head, or (none) by its picture."""

    embedding: tuple[float, ...]
    release: str
    tier: Tier


class Load:
    """All requests of a plan: ``allow`` how many may begin, ``join`` all of them; ``entries`` is the history."""

    def __init__(
        self, address: str, world: TinyWorld, asks: Sequence[Ask], *, clients: int = 16,
        corpus_id: str = CORPUS_ID, model_id: str = MODEL_ID, clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = address
        self._world = world
        self._asks = asks
        self._clients = clients
        self._corpus_id, self._model_id = corpus_id, model_id
        self._clock = clock
        self._allowed = 0
        self._active = ""
        self._questions: dict[str, _Question] = {}
        self._asked: set[str] = set()
        self._no_sketches: set[str] = set()
        self._watching: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="chaos-load", daemon=True)
        self._failed: BaseException | None = None
        self.entries: list[Entry] = []
        self.acknowledged: list[tuple[Ask, str]] = []
        #: How often a call was refused or failed and was made again, by reason.
        self.refusals: Counter[str] = Counter()

    def start(self) -> None:
        """Begin; nothing is asked before ``allow``."""
        self._thread.start()

    def allow(self, share: float) -> None:
        """Let this share of all requests begin (1: all). It never shrinks."""
        self._allowed = max(self._allowed, round(share * len(self._asks)))

    @property
    def finished(self) -> bool:
        """Whether every request was acknowledged, or the load broke."""
        return not self._thread.is_alive()

    def join(self) -> None:
        """After ``finished``: raises what broke the load, if anything did."""
        self._thread.join()
        if self._failed is not None:
            raise self._failed

    def withdraw(self, item: int) -> None:
        """Withdraw an item over the API, from any thread but the load's; noted when it is acknowledged."""

        async def ask() -> None:
            async with self._client(PROJECTS[0][0]) as client:
                await self._told(lambda: client.withdraw(self._corpus_id, [item], "chaos"))
                self.entries.append(Withdrawn(item, self._clock()))

        asyncio.run(ask())

    def read_all(self) -> None:
        """Read every acknowledged job once more, from any thread, after ``join``."""

        async def everything() -> None:
            async with AsyncExitStack() as stack:
                clients = {name: await stack.enter_async_context(self._client(name)) for name, _ in PROJECTS}
                gate = asyncio.Semaphore(self._clients)

                async def one(ask: Ask, job_id: str) -> None:
                    async with gate:
                        await self._read(clients[ask.project], job_id)

                await asyncio.gather(*(one(*pair) for pair in self.acknowledged))

        asyncio.run(everything())

    # -- on the load's thread -------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._all())
        except BaseException as error:  # kept for ``join``: a thread's exception is nobody's
            self._failed = error
            log.exception("load_broke")
        finally:
            self._loop.close()

    async def _all(self) -> None:
        numbers = iter(range(len(self._asks)))
        async with AsyncExitStack() as stack:
            clients = {name: await stack.enter_async_context(self._client(name)) for name, _ in PROJECTS}

            async def steadily() -> None:
                for number in numbers:
                    while number >= self._allowed:
                        await asyncio.sleep(0.02)
                    await self._one(clients[self._asks[number].project], self._asks[number])

            watch = asyncio.ensure_future(self._watch_release(clients[PROJECTS[0][0]]))
            await asyncio.gather(*(steadily() for _ in range(self._clients)))
            watch.cancel()
            await asyncio.gather(*self._watching)

    async def _watch_release(self, client: AsyncClient) -> None:
        while True:
            active = (await self._told(lambda: client.releases(self._model_id)))[1]
            self._active = "" if active is None else active.release.rpartition("/")[2]
            await asyncio.sleep(0.5)

    async def _one(self, client: AsyncClient, ask: Ask) -> None:
        job = await self._created(client, ask)
        self._note(ask, job)
        if ask.watched:  # beside everything else: a slow job must not keep a client from asking
            self._watching.add(asyncio.create_task(self._watch(client, job)))
        if ask.repeated:
            self._note(ask, await self._created(client, ask), again=True)
        if ask.cancelled_after_s is not None:
            await asyncio.sleep(ask.cancelled_after_s)
            await self._until_told(lambda: client.cancel(job), give_up=("JOB_NOT_CANCELLABLE", *_GONE))
        if ask.query % 4 == 0:  # some answers are read while the system is under attack
            await self._read(client, job.id)

    async def _created(self, client: AsyncClient, ask: Ask) -> Job:
        """The job of this request. What it asks stays the same until it is refused for good: an answer that got lost
        must find the same question when it is put again."""
        while True:
            question = self._questions.get(ask.request) or await self._question(ask)
            self._questions[ask.request] = question
            job: Job | None
            if ask.waits and ask.request not in self._asked:
                self._asked.add(ask.request)
                try:
                    job = await self._attributed(client, ask, question)
                except BylineError as error:  # a refusal, or how its job ended: Create tells them apart
                    self.refusals[error.reason] += 1
                    continue
            else:
                job = await self._until_told(lambda: self._submitted(client, ask, question), _ASK_ANEW)  # noqa: B023
            if job is not None:
                return job
            del self._questions[ask.request]
            self._no_sketches.add(ask.request)

    async def _question(self, ask: Ask) -> _Question:
        while not self._active:
            await asyncio.sleep(0.05)
        if ask.by_embedding and self._active in self._world.embeddings:
            vectors = self._world.embeddings[self._active]
            return _Question(tuple(vectors[ask.query % len(vectors)].tolist()), self._active, Tier.RETRIEVED)
        refused = ask.tier is Tier.ESTIMATED and ask.request in self._no_sketches
        return _Question((), "", Tier.RETRIEVED if refused else ask.tier)

    async def _attributed(self, client: AsyncClient, ask: Ask, question: _Question) -> Job:
        began = self._clock()
        if question.embedding:
            name = f"models/{self._model_id}/releases/{question.release}"
            found = await client.attribute_embedding(question.embedding, name, "", TOP_K, request_id=ask.request)
        else:
            data, prompt = self._world.pictures[ask.query % len(self._world.pictures)]
            found = await client.attribute(data, prompt, "RETRIEVED", TOP_K, request_id=ask.request)
        self.entries += _reads(found.job, began, self._clock(), "attribute")
        return found.job

    async def _submitted(self, client: AsyncClient, ask: Ask, question: _Question) -> Job:
        ttl_s = None if ask.waits else ask.ttl_s
        if question.embedding:
            name = f"models/{self._model_id}/releases/{question.release}"
            return await client.submit_embedding(
                question.embedding, name, "", TOP_K, ttl_s=ttl_s, request_id=ask.request
            )
        data, prompt = self._world.pictures[ask.query % len(self._world.pictures)]
        return await client.submit(
            data, prompt, question.tier.value, TOP_K, candidates=CANDIDATES if question.tier is Tier.VERIFIED else None,
            best_effort=ask.best_effort, ttl_s=ttl_s, request_id=ask.request,
        )  # fmt: skip

    def _note(self, ask: Ask, job: Job, *, again: bool = False) -> None:
        self.entries.append(Acknowledged(ask.request, ask.project, job.id, self._clock()))
        if not again:
            self.acknowledged.append((ask, job.id))

    async def _read(self, client: AsyncClient, job_id: str) -> None:
        async def read() -> tuple[float, Job]:
            return self._clock(), await client.get(job_id)

        told = await self._until_told(read, give_up=_GONE)
        if told is None:  # the checker will say so: it looks for the row of each acknowledgement
            return
        began, job = told
        self.entries += _reads(job, began, self._clock(), "get")

    async def _watch(self, client: AsyncClient, job: Job) -> None:
        """Follow a job to its end; an answer is noted when it comes, and again when it has changed."""
        began, states, noted, ended = self._clock(), list[str](), dict[str, tuple[int, ...]](), False
        try:
            async for seen in client.watch(job, timeout=WATCH_S):
                if states[-1:] != [seen.state]:
                    states.append(seen.state)
                for read in _reads(seen, began, self._clock(), "watch"):
                    if noted.get(read.tier) != read.items:
                        noted[read.tier] = read.items
                        self.entries.append(read)
            ended = True
        except BylineError as error:
            self.refusals[error.reason] += 1
        self.entries.append(Watched(job.id, tuple(states), ended))

    async def _told(self, call: Callable[[], Awaitable[T]]) -> T:
        """As ``_until_told`` of a call that no refusal ends."""
        while (found := await self._until_told(call)) is None:
            await asyncio.sleep(0.2)
        return found

    async def _until_told(self, call: Callable[[], Awaitable[T]], give_up: Sequence[str] = ()) -> T | None:
        """The answer of ``call``, made again until there is one; None once it is refused for a reason of ``give_up``.

        Raises every error that trying again cannot mend.
        """
        while True:
            try:
                return await call()
            except BylineError as error:
                self.refusals[error.reason] += 1
                if error.reason in give_up:
                    return None
                if error.code not in _WORTH_ANOTHER_TRY:
                    raise
                if error.code == "INTERNAL":
                    log.warning("call_failed", reason=error.reason, error=error.message, **error.metadata)
                await asyncio.sleep(min(2.0, error.retry_after_s or 0.2))

    def _client(self, project: str) -> AsyncClient:
        return AsyncClient(self._address, project=project, model=self._model_id, timeout=20)


def _reads(job: Job, began: float, ended: float, how: str) -> list[Read]:
    return [
        Read(
            job.id, answer.tier, answer.release.rpartition("/")[2],
            tuple(influence.item_id for influence in answer.influences), began, ended, how,
        )
        for answer in job.answers
    ]  # fmt: skip
