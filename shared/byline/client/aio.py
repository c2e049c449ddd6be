"""The asyncio client.

Why it exists: services that ask for thousands of images at once. The same calls, values and errors as the
synchronous client; create it inside a running event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from attribution.v1 import attribution_service_pb2_grpc, catalog_service_pb2_grpc, operator_service_pb2_grpc
from byline.client import failures, wire
from byline.client.calls import (
    INLINE_BYTES,
    Call,
    Calls,
    Query,
    epoch_of,
    image_bytes,
    job_options,
)
from byline.client.connection import open_aio_channel
from byline.client.sync import concluded, reupload_after, rewatch_after
from byline.client.values import (
    ActiveRelease,
    Attribution,
    ImageSource,
    Job,
    QueueStatus,
    Release,
    Withdrawal,
)
from byline.config import DEFAULT_GRPC_ADDRESS
from byline.errors import CallTimedOut

T = TypeVar("T")


class AsyncClient:
    """A connection to a Byline server; see ``byline.client.Client``, whose methods these are."""

    def __init__(
        self,
        address: str = DEFAULT_GRPC_ADDRESS,
        project: str = "default",
        *,
        model: str = "",
        timeout: float = 30.0,
        credentials: grpc.ChannelCredentials | None = None,
        api_key: str = "",
    ) -> None:
        self._address = address
        self._timeout = timeout
        self._calls = Calls(project, model)
        self._channel = open_aio_channel(address, credentials, api_key)
        self._stubs: dict[str, Any] = {
            "AttributionService": attribution_service_pb2_grpc.AttributionServiceStub(self._channel),  # type: ignore[no-untyped-call]
            "CatalogService": catalog_service_pb2_grpc.CatalogServiceStub(self._channel),  # type: ignore[no-untyped-call]
            "OperatorService": operator_service_pb2_grpc.OperatorServiceStub(self._channel),  # type: ignore[no-untyped-call]
        }

    async def attribute(
        self,
        image: ImageSource,
        prompt: str = "",
        tier: str = "RETRIEVED",
        top_k: int | None = None,
        *,
        candidates: int | None = None,
        best_effort: bool = False,
        labelling_consent: bool = False,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> Attribution:
        """Which training images made this image possible? As ``Client.attribute``."""
        allowed = timeout if timeout is not None else (self._timeout if tier.upper() == "RETRIEVED" else 600.0)
        ends = time.monotonic() + allowed
        query = await self._query(image, prompt)
        options = job_options(tier, top_k, candidates, best_effort, None, labelling_consent)
        return await self._concluded(query, options, request_id, allowed, ends)

    async def attribute_embedding(
        self, embedding: Sequence[float], release: str, prompt: str = "", top_k: int | None = None,
        *, request_id: str | None = None, timeout: float | None = None,
    ) -> Attribution:  # fmt: skip
        """As ``attribute``, from a ready embedding made with the head of ``release``."""
        allowed = self._timeout if timeout is None else timeout
        query = Query(prompt, embedding=embedding, release=release)
        options = job_options("RETRIEVED", top_k, None, False, None)
        return await self._concluded(query, options, request_id, allowed, time.monotonic() + allowed)

    async def _concluded(
        self, query: Query, options: Any, request_id: str | None, allowed: float, ends: float
    ) -> Attribution:
        job = await self._do(self._calls.attribute(query, options, request_id), min(allowed, self._timeout))
        if not job.done:
            async for state in self.watch(job, timeout=max(0.0, ends - time.monotonic())):
                job = state
        return concluded(job)

    async def submit(
        self,
        image: ImageSource,
        prompt: str = "",
        tier: str = "RETRIEVED",
        top_k: int | None = None,
        *,
        candidates: int | None = None,
        best_effort: bool = False,
        labelling_consent: bool = False,
        ttl_s: float | None = None,
        request_id: str | None = None,
    ) -> Job:
        """Create a job and return at once."""
        options = job_options(tier, top_k, candidates, best_effort, ttl_s, labelling_consent)
        return await self._do(self._calls.create(await self._query(image, prompt), options, request_id))

    async def submit_embedding(
        self, embedding: Sequence[float], release: str, prompt: str = "", top_k: int | None = None,
        *, ttl_s: float | None = None, request_id: str | None = None,
    ) -> Job:  # fmt: skip
        """Create a job from a ready embedding."""
        query = Query(prompt, embedding=embedding, release=release)
        options = job_options("RETRIEVED", top_k, None, False, ttl_s)
        return await self._do(self._calls.create(query, options, request_id))

    async def get(self, job: str | Job) -> Job:
        """A job as it is now."""
        return await self._do(self._calls.get(job))

    async def list(self, states: Sequence[str] = (), limit: int = 50) -> list[Job]:
        """The project's jobs, newest first, without answers; at most ``limit``."""
        found: list[Job] = []
        token = ""
        while len(found) < limit:
            page, token = await self._do(self._calls.page(states, min(limit - len(found), 1000), token))
            found += page
            if not token:
                break
        return found[:limit]

    async def cancel(self, job: str | Job) -> Job:
        """Cancel a job."""
        return await self._do(self._calls.cancel(job))

    async def delete(self, job: str | Job) -> None:
        """Delete a job that has ended, with its answers and its image."""
        await self._do(self._calls.delete(job))

    async def watch(self, job: str | Job, timeout: float | None = None) -> AsyncIterator[Job]:
        """The job now and after each change, until it ends. As ``Client.watch``."""
        ends = None if timeout is None else time.monotonic() + timeout
        seen = -1
        broken = 0
        while True:
            left = None if ends is None else ends - time.monotonic()
            if left is not None and left <= 0:
                raise CallTimedOut(f"the job did not end within {timeout} s", address=self._address)
            stream = self._stubs["AttributionService"].WatchAttributionJob(self._calls.watch(job), timeout=left)
            try:
                async for message in stream:
                    broken = 0
                    value = wire.job(message.attribution_job)
                    if value.revision > seen:
                        seen = value.revision
                        yield value
                        if value.done:
                            return
            except grpc.RpcError as error:
                broken += 1
                wait_s = rewatch_after(failures.from_call(error, self._address), broken)
                await asyncio.sleep(wait_s if ends is None else max(0.0, min(wait_s, ends - time.monotonic())))
            finally:
                stream.cancel()

    async def upload(self, image: ImageSource) -> str:
        """Store an image and return its resource name. An upload that breaks goes on where it broke, three times."""
        data, offset = image_bytes(image), 0
        stub = self._stubs["AttributionService"]
        for broken in range(1, 5):
            try:
                return str((await stub.UploadImage(self._calls.upload(data, offset), timeout=self._timeout)).name)
            except grpc.RpcError as error:
                await asyncio.sleep(reupload_after(failures.from_call(error, self._address), broken))
                committed = await self._do(self._calls.committed(data))
                offset = committed if committed < len(data) else 0
        raise AssertionError("reupload_after has not raised")

    async def item_image(self, item: str) -> bytes:
        """The image of a corpus item."""
        return await self._do(self._calls.item_image(item))

    async def releases(self, model: str) -> tuple[Sequence[Release], ActiveRelease | None]:
        """The releases of a model and which one is active."""
        found, active, token = await self._do(self._calls.releases(model))
        while token:
            page, active, token = await self._do(self._calls.releases(model, token))
            found += page
        return found, active

    async def activate(self, model: str, release: str, epoch: int | None = None, reason: str = "") -> ActiveRelease:
        """Make a release the active one."""
        return await self._do(self._calls.activate(model, release, epoch, reason))

    async def rollback(self, model: str, epoch: int | None = None, reason: str = "") -> ActiveRelease:
        """Activate the release before the present one; see ``Client.rollback``."""
        if epoch is None:
            epoch = epoch_of((await self._do(self._calls.releases(model)))[1])
        return await self._do(self._calls.rollback(model, epoch, reason))

    async def queues(self) -> QueueStatus:
        """How much work waits, and who is working."""
        return await self._do(self._calls.queues())

    async def withdraw(self, corpus: str, item_ids: Sequence[int], reason: str = "") -> Withdrawal:
        """Withdraw items for good."""
        return await self._do(self._calls.withdraw(corpus, item_ids, reason))

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _query(self, image: ImageSource, prompt: str) -> Query:
        data = await asyncio.to_thread(image_bytes, image)
        if len(data) <= INLINE_BYTES:
            return Query(prompt, data=data)
        return Query(prompt, image=await self.upload(data))

    async def _do(self, call: Call[T], timeout: float | None = None) -> T:
        method = getattr(self._stubs[call.service], call.method)
        try:
            response = await method(call.request, timeout=self._timeout if timeout is None else timeout)
        except grpc.RpcError as error:
            raise failures.from_call(error, self._address) from error
        return call.read(response)
