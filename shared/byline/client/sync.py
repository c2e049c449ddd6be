"""The synchronous client.

Why it exists: scripts, notebooks and the command line. Thread-safe; one channel, reconnected as needed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
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
from byline.client.connection import open_channel
from byline.client.values import (
    ActiveRelease,
    Answer,
    Attribution,
    ImageSource,
    Job,
    QueueStatus,
    Release,
    Withdrawal,
)
from byline.config import DEFAULT_GRPC_ADDRESS
from byline.errors import BylineError, CallTimedOut, JobCancelled, WatchEnded

T = TypeVar("T")


class Client:
    """A connection to a Byline server.

    ``timeout`` (seconds) is the deadline of every single call; ``attribute`` and ``watch`` may take longer and
    have their own. ``api_key`` where the server asks for one; ``credentials`` from ``byline.client.tls(...)``. Errors
    are the typed ones of ``byline.errors``; ``ServerUnreachable`` if nobody answers.
    """

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
        self._channel = open_channel(address, credentials, api_key)
        self._stubs: dict[str, Any] = {
            "AttributionService": attribution_service_pb2_grpc.AttributionServiceStub(self._channel),  # type: ignore[no-untyped-call]
            "CatalogService": catalog_service_pb2_grpc.CatalogServiceStub(self._channel),  # type: ignore[no-untyped-call]
            "OperatorService": operator_service_pb2_grpc.OperatorServiceStub(self._channel),  # type: ignore[no-untyped-call]
        }

    def attribute(
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
        """Which training images made this image possible? Waits for the answer of ``tier``.

        ``timeout`` seconds in all (default: the client's for RETRIEVED, 10 minutes for VERIFIED): CallTimedOut
        after that, the job goes on. A failed job raises its own error, a cancelled one JobCancelled.
        """
        allowed = timeout if timeout is not None else (self._timeout if tier.upper() == "RETRIEVED" else 600.0)
        ends = time.monotonic() + allowed
        query = self._query(image, prompt)
        options = job_options(tier, top_k, candidates, best_effort, None, labelling_consent)
        return self._concluded(query, options, request_id, allowed, ends)

    def attribute_embedding(
        self, embedding: Sequence[float], release: str, prompt: str = "", top_k: int | None = None,
        *, request_id: str | None = None, timeout: float | None = None,
    ) -> Attribution:  # fmt: skip
        """As ``attribute``, from a ready embedding made with the head of ``release`` (see ``submit_embedding``)."""
        allowed = self._timeout if timeout is None else timeout
        query = Query(prompt, embedding=embedding, release=release)
        options = job_options("RETRIEVED", top_k, None, False, None)
        return self._concluded(query, options, request_id, allowed, time.monotonic() + allowed)

    def _concluded(
        self, query: Query, options: Any, request_id: str | None, allowed: float, ends: float
    ) -> Attribution:
        job = self._do(self._calls.attribute(query, options, request_id), min(allowed, self._timeout))
        if not job.done:
            for state in self.watch(job, timeout=max(0.0, ends - time.monotonic())):
                job = state
        return concluded(job)

    def submit(
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
        """Create a job and return at once. The same ``request_id`` gives the same job."""
        options = job_options(tier, top_k, candidates, best_effort, ttl_s, labelling_consent)
        return self._do(self._calls.create(self._query(image, prompt), options, request_id))

    def submit_embedding(
        self, embedding: Sequence[float], release: str, prompt: str = "", top_k: int | None = None,
        *, ttl_s: float | None = None, request_id: str | None = None,
    ) -> Job:  # fmt: skip
        """Create a job from a ready embedding, made with the head of ``release`` (a name, see ``releases``)."""
        query = Query(prompt, embedding=embedding, release=release)
        return self._do(self._calls.create(query, job_options("RETRIEVED", top_k, None, False, ttl_s), request_id))

    def get(self, job: str | Job) -> Job:
        """A job as it is now; ``job`` is a Job, a resource name or a bare id."""
        return self._do(self._calls.get(job))

    def list(self, states: Sequence[str] = (), limit: int = 50) -> list[Job]:
        """The project's jobs, newest first, without answers; at most ``limit``."""
        found: list[Job] = []
        token = ""
        while len(found) < limit:
            page, token = self._do(self._calls.page(states, min(limit - len(found), 1000), token))
            found += page
            if not token:
                break
        return found[:limit]

    def cancel(self, job: str | Job) -> Job:
        """Cancel a job. JobNotCancellable if it has ended."""
        return self._do(self._calls.cancel(job))

    def delete(self, job: str | Job) -> None:
        """Delete a job that has ended, with its answers and its image. JobNotDeletable while it has not."""
        self._do(self._calls.delete(job))

    def watch(self, job: str | Job, timeout: float | None = None) -> Iterator[Job]:
        """The job now and after each change, until it ends. CallTimedOut after ``timeout`` seconds (None: never).

        A stream that breaks or that the server ends is opened again; nothing is reported twice.
        """
        ends = None if timeout is None else time.monotonic() + timeout
        seen = -1
        broken = 0
        while True:
            left = None if ends is None else ends - time.monotonic()
            if left is not None and left <= 0:
                raise CallTimedOut(f"the job did not end within {timeout} s", address=self._address)
            stream = self._stubs["AttributionService"].WatchAttributionJob(self._calls.watch(job), timeout=left)
            try:
                for message in stream:
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
                time.sleep(wait_s if ends is None else max(0.0, min(wait_s, ends - time.monotonic())))
            finally:
                stream.cancel()

    def upload(self, image: ImageSource) -> str:
        """Store an image and return its resource name. An upload that breaks goes on where it broke, three times."""
        data, offset = image_bytes(image), 0
        for broken in range(1, 5):
            try:
                messages = self._calls.upload(data, offset)
                return str(self._stubs["AttributionService"].UploadImage(messages, timeout=self._timeout).name)
            except grpc.RpcError as error:
                time.sleep(reupload_after(failures.from_call(error, self._address), broken))
                committed = self._do(self._calls.committed(data))
                offset = committed if committed < len(data) else 0
        raise AssertionError("reupload_after has not raised")

    def query_image(self, job: str | Job) -> bytes:
        """The query image of a job. BlobNotFound if it was asked by embedding."""
        try:
            stream = self._stubs["AttributionService"].DownloadQueryImage(
                self._calls.download(job), timeout=self._timeout
            )
            return b"".join(message.chunk for message in stream)
        except grpc.RpcError as error:
            raise failures.from_call(error, self._address) from error

    def item_image(self, item: str) -> bytes:
        """The image of a corpus item (``Influence.name``). ItemNotFound if it is unknown or withdrawn."""
        return self._do(self._calls.item_image(item))

    def releases(self, model: str) -> tuple[Sequence[Release], ActiveRelease | None]:
        """The releases of a model, newest first, and which one is active."""
        found, active, token = self._do(self._calls.releases(model))
        while token:
            page, active, token = self._do(self._calls.releases(model, token))
            found += page
        return found, active

    def activate(self, model: str, release: str, epoch: int | None = None, reason: str = "") -> ActiveRelease:
        """Make a release the active one; with ``epoch``, only if no other activation came first."""
        return self._do(self._calls.activate(model, release, epoch, reason))

    def rollback(self, model: str, epoch: int | None = None, reason: str = "") -> ActiveRelease:
        """Activate the release before the present one, only if no other activation comes first.

        Without ``epoch`` the present one is read first. The call is never repeated for you: after an UNAVAILABLE
        error or CallTimedOut it may have been carried out, so look at ``releases`` before you repeat it.
        """
        if epoch is None:
            epoch = epoch_of(self._do(self._calls.releases(model))[1])
        return self._do(self._calls.rollback(model, epoch, reason))

    def queues(self) -> QueueStatus:
        """How much work waits, and who is working."""
        return self._do(self._calls.queues())

    def pause(self, stage: str) -> None:
        """Stop dispatching a stage."""
        self._do(self._calls.pause(stage, True))

    def resume(self, stage: str) -> None:
        """Dispatch a stage again."""
        self._do(self._calls.pause(stage, False))

    def withdraw(self, corpus: str, item_ids: Sequence[int], reason: str = "") -> Withdrawal:
        """Withdraw items for good: once this returns they are in no answer any more."""
        return self._do(self._calls.withdraw(corpus, item_ids, reason))

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _query(self, image: ImageSource, prompt: str) -> Query:
        data = image_bytes(image)
        if len(data) <= INLINE_BYTES:
            return Query(prompt, data=data)
        return Query(prompt, image=self.upload(data))

    def _do(self, call: Call[T], timeout: float | None = None) -> T:
        method = getattr(self._stubs[call.service], call.method)
        try:
            return call.read(method(call.request, timeout=self._timeout if timeout is None else timeout))
        except grpc.RpcError as error:
            raise failures.from_call(error, self._address) from error


def concluded(job: Job) -> Attribution:
    """The answer of a job that ended (or was asked for its first answer only). Raises what ended it otherwise."""
    if job.error is not None:
        raise failures.from_problem(job.error)
    if job.state == "CANCELLED":
        raise JobCancelled("the job was cancelled", job=job.name)
    answer: Answer | None = job.answer
    if answer is None:
        raise CallTimedOut("the job has no answer yet", job=job.name)
    return Attribution(job, answer)


def reupload_after(error: BylineError, broken: int) -> float:
    """Seconds to wait before an upload goes on; raises ``error`` if that would not help or was tried often enough."""
    if error.code == "UNAVAILABLE" and broken <= 3:
        return 0.2 * float(2**broken)
    raise error


def rewatch_after(error: BylineError, broken: int) -> float:
    """Seconds to wait before watching again; raises ``error`` if that would not help or was tried often enough."""
    if isinstance(error, WatchEnded):
        return error.retry_after_s or 0.0
    if error.code == "UNAVAILABLE" and broken <= 5:
        return float(min(0.2 * 2 ** (broken - 1), 3.0))
    raise error
