"""AttributionService: create, read, list, cancel and watch jobs; ask in one call; upload images.

Why it exists: the handlers, and nothing but the handlers. Errors are raised as typed exceptions; the
interceptor turns them into statuses.
"""

# ruff: noqa: N802 - the methods have the names the protos give them.

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from attribution.v1 import attribution_job_pb2 as job_wire
from attribution.v1 import attribution_service_pb2 as wire
from attribution.v1 import attribution_service_pb2_grpc as rpc
from byline.errors import BlobNotFound, DatabaseUnavailable, InvalidRequest, JobNotFound, WatchEnded
from byline.jobs.model import Job
from byline.jobs.states import State
from byline.telemetry import WATCH_STREAMS
from services.gateway import convert, names, reading, submission
from services.gateway.changes import wait
from services.gateway.context import GatewayContext, refuse_if_busy
from services.gateway.images import CHUNK_BYTES, describe, state_of_upload, upload
from services.gateway.paging import page_size
from services.gateway.requests import Asked, new_job

MAX_BATCH = 100
#: How much of the call's time Attribute keeps for sending its answer.
_ATTRIBUTE_MARGIN_S = 0.25


class AttributionServicer(rpc.AttributionServiceServicer):
    """The handlers of AttributionService. ``clock`` gives monotonic seconds."""

    def __init__(
        self,
        context: GatewayContext,
        *,
        poll_s: float = 2.0,
        watch_s: float = 600.0,
        max_wait_s: float = 9.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._context = context
        self._poll_s = poll_s
        self._watch_s = watch_s
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._draining = False

    def drain(self) -> None:
        """End all watches; clients watch again, elsewhere."""
        self._draining = True
        self._context.changes.wake_all()

    async def CreateAttributionJob(
        self, request: wire.CreateAttributionJobRequest, context: Any
    ) -> job_wire.AttributionJob:
        """Commit one job and return it."""
        asked = self._asked(request, names.parse_project(request.parent))
        if request.validate_only:
            await self._context.offload(submission.admit, self._context, asked)
            return job_wire.AttributionJob(model=names.model(asked.job.model_id))
        refuse_if_busy(self._context)
        job = await self._context.offload(submission.submit, self._context, asked)
        return await self._render(job)

    async def BatchCreateAttributionJobs(
        self, request: wire.BatchCreateAttributionJobsRequest, context: Any
    ) -> wire.BatchCreateAttributionJobsResponse:
        """Commit up to 100 jobs, all or none."""
        project_id = names.parse_project(request.parent)
        if not 1 <= len(request.requests) <= MAX_BATCH:
            raise InvalidRequest("requests", f"needs 1 to {MAX_BATCH} requests", value=len(request.requests))
        many = []
        for position, one in enumerate(request.requests):
            prefix = f"requests[{position}]."
            if one.parent and one.parent != request.parent:
                raise InvalidRequest(f"{prefix}parent", "must be empty or the batch's parent")
            if one.validate_only:
                raise InvalidRequest(f"{prefix}validate_only", "is not possible in a batch")
            many.append(self._asked(one, project_id, prefix))
        ids = [asked.job.request_id for asked in many]
        if len(set(ids)) != len(ids):
            raise InvalidRequest("requests", "each request_id may stand in a batch once")
        refuse_if_busy(self._context)
        jobs = await self._context.offload(submission.submit_many, self._context, many)
        messages = await self._context.offload(reading.render_batch, self._context, jobs)
        return wire.BatchCreateAttributionJobsResponse(attribution_jobs=messages)

    async def GetAttributionJob(self, request: wire.GetAttributionJobRequest, context: Any) -> job_wire.AttributionJob:
        """Read one job."""
        job = await self._row(request.name)
        return await self._render(job, with_answers=request.view != wire.JOB_VIEW_BASIC)

    async def ListAttributionJobs(
        self, request: wire.ListAttributionJobsRequest, context: Any
    ) -> wire.ListAttributionJobsResponse:
        """One keyset page of a project's jobs, newest first."""
        project_id = names.parse_project(request.parent)
        states = [self._state(number) for number in request.states]
        size = page_size(request.page_size)
        with_answers = request.view == wire.JOB_VIEW_FULL
        listing = {"project": project_id, "states": sorted(states), "full": with_answers}
        after = self._context.tokens.decode(request.page_token, listing)
        jobs = await self._context.offload(self._context.jobs.list, project_id, states, size + 1, after)
        messages = await self._context.offload(
            reading.render_page, self._context, jobs[:size], with_answers=with_answers
        )
        token = ""
        if len(jobs) > len(messages):
            last = jobs[len(messages) - 1]
            token = self._context.tokens.encode((last.create_time, last.id), listing)
        return wire.ListAttributionJobsResponse(attribution_jobs=messages, next_page_token=token)

    async def CancelAttributionJob(
        self, request: wire.CancelAttributionJobRequest, context: Any
    ) -> job_wire.AttributionJob:
        """Ask for cancellation."""
        job = await self._row(request.name)
        return await self._render(await self._context.offload(self._context.jobs.cancel, job.project_id, job.id))

    async def WatchAttributionJob(
        self, request: wire.WatchAttributionJobRequest, context: Any
    ) -> AsyncIterator[wire.WatchAttributionJobResponse]:
        """The job now, then after each change, until its terminal state."""
        project_id, job_id = names.parse_job(request.name)
        with_answers = request.view != wire.JOB_VIEW_BASIC
        ends = self._clock() + self._watch_s
        sent = -1
        with self._context.changes.subscribe(job_id) as changed, WATCH_STREAMS.track_inprogress():
            while True:
                changed.clear()
                job, message = await self._context.offload(
                    reading.changed, self._context, project_id, job_id, sent, with_answers=with_answers
                )
                if message is not None:
                    read_time = Timestamp()
                    read_time.GetCurrentTime()
                    yield wire.WatchAttributionJobResponse(attribution_job=message, read_time=read_time)
                    sent = job.revision
                if job.is_terminal:
                    return
                left = ends - self._clock()
                if self._draining or left <= 0:
                    raise WatchEnded("the stream ends here; watch again", revision=sent)
                await wait(changed, min(self._poll_s, left))

    async def Attribute(self, request: wire.AttributeRequest, context: Any) -> wire.AttributeResponse:
        """Create a job and wait for its first answer."""
        project_id = names.parse_project(request.parent)
        limit = self._wait_s(request, context.time_remaining())
        asked = new_job(
            project_id, request.model, request.query, request.options, request.request_id, self._context.limits
        )
        ends = self._clock() + limit
        refuse_if_busy(self._context)
        # Nothing is acknowledged before the answer, whose commit is flushed: the job's own need not be.
        (job,) = await self._context.offload(submission.submit_many, self._context, [asked], flush=False)
        message: job_wire.AttributionJob | None = None
        if not reading.in_lookup(job):  # the answer to a request that was made before
            message = await self._render(job)
        try:
            with self._context.changes.answer_of(job.id) as answered:
                while message is None and not self._draining and (left := ends - self._clock()) > 0:
                    await wait(answered, min(self._poll_s, left))
                    answered.clear()
                    message = await self._context.offload(reading.first_answer, self._context, project_id, job.id)
            if message is None:
                message = await self._context.offload(reading.kept, self._context, project_id, job.id)
        except JobNotFound as error:
            raise DatabaseUnavailable("the database stopped before the job was on its disk; ask again") from error
        return wire.AttributeResponse(attribution_job=message)

    async def UploadImage(self, request_iterator: AsyncIterator[wire.UploadImageRequest], context: Any) -> wire.Image:
        """Store an image under its digest."""
        return await upload(self._context, request_iterator)

    async def GetImageUpload(self, request: wire.GetImageUploadRequest, context: Any) -> wire.ImageUpload:
        """How much of an image is there."""
        project_id, sha256 = names.parse_image(request.name, "name")
        return await self._context.offload(state_of_upload, self._context, project_id, sha256)

    async def DeleteAttributionJob(
        self, request: wire.DeleteAttributionJobRequest, context: Any
    ) -> wire.DeleteAttributionJobResponse:
        """Delete a job that has ended."""
        await self._context.offload(self._context.retention.delete_job, *names.parse_job(request.name))
        return wire.DeleteAttributionJobResponse()

    async def DownloadQueryImage(
        self, request: wire.DownloadQueryImageRequest, context: Any
    ) -> AsyncIterator[wire.DownloadQueryImageResponse]:
        """The query image of a job, in chunks."""
        job = await self._row(request.name)
        if job.image_sha256 is None:
            raise BlobNotFound("the job was asked by embedding: the service has never seen its image", job=job.id)
        data = await self._context.offload(self._context.blobs.get, job.image_sha256)
        yield wire.DownloadQueryImageResponse(image=describe(job.project_id, data, self._context.limits))
        for start in range(0, len(data), CHUNK_BYTES):
            yield wire.DownloadQueryImageResponse(chunk=data[start : start + CHUNK_BYTES])

    def _asked(self, request: wire.CreateAttributionJobRequest, project_id: str, prefix: str = "") -> Asked:
        job = request.attribution_job
        return new_job(project_id, job.model, job.query, job.options, request.request_id, self._context.limits, prefix)

    async def _row(self, name: str) -> Job:
        project_id, job_id = names.parse_job(name)
        return await self._context.offload(reading.row, self._context, project_id, job_id)

    async def _render(self, job: Job, *, with_answers: bool = True) -> job_wire.AttributionJob:
        return await self._context.offload(reading.render, self._context, job, with_answers=with_answers)

    def _wait_s(self, request: wire.AttributeRequest, remaining: float | None) -> float:
        allowed = self._max_wait_s if remaining is None else min(self._max_wait_s, remaining - _ATTRIBUTE_MARGIN_S)
        if request.HasField("wait"):
            asked = request.wait.seconds + request.wait.nanos / 1e9
            if asked < 0:
                raise InvalidRequest("wait", "must not be negative")
            allowed = min(allowed, asked)
        return allowed

    @staticmethod
    def _state(number: int) -> State:
        state = convert.state_from_wire(number)
        if state is None:
            raise InvalidRequest("states", "holds a value that is no state of a job", value=number)
        return state
