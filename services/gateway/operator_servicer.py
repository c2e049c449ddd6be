"""OperatorService: releases, queues, workers and dead jobs.

Why it exists: what an operator does at night must be possible over the API alone, and leave an audit trail
(the registry writes it).
"""

# ruff: noqa: N802 - the methods have the names the protos give them.

from __future__ import annotations

from datetime import timedelta
from typing import Any

from attribution.v1 import attribution_job_pb2 as job_wire
from attribution.v1 import operator_service_pb2 as wire
from attribution.v1 import operator_service_pb2_grpc as rpc
from attribution.v1 import release_pb2 as release_wire
from byline.db.session import transaction
from byline.errors import InvalidRequest
from byline.jobs.outbox import StageDepth
from byline.jobs.states import Stage
from byline.security.scopes import current_principal
from services.gateway import convert, fleet, names, reading
from services.gateway.context import GatewayContext
from services.gateway.paging import fitting, page_size

#: Releases of a page for those who ask for no size.
DEFAULT_RELEASES = 100
#: The parent that stands for every project (AIP-159).
ALL_PROJECTS = "projects/-"


class OperatorServicer(rpc.OperatorServiceServicer):
    """The handlers of OperatorService."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context

    async def ListReleases(self, request: wire.ListReleasesRequest, context: Any) -> wire.ListReleasesResponse:
        """One keyset page of a model's releases, newest first, and which one is active."""
        model_id = names.parse_model(request.parent, "parent")
        size = page_size(request.page_size, DEFAULT_RELEASES)
        return await self._context.offload(self._list_releases, model_id, size, request.page_token)

    async def ActivateRelease(self, request: wire.ActivateReleaseRequest, context: Any) -> release_wire.ActiveRelease:
        """Make a release the active one."""
        model_id, release_id = names.parse_release(request.name)
        epoch = request.epoch if request.HasField("epoch") else None
        active = await self._context.offload(
            self._context.registry.activate, model_id, release_id, epoch, request.reason, current_principal().name
        )
        return convert.active_release(active)

    async def RollbackRelease(self, request: wire.RollbackReleaseRequest, context: Any) -> release_wire.ActiveRelease:
        """Activate the release before the present one."""
        model_id = names.parse_model(request.model, "model")
        epoch = request.epoch if request.HasField("epoch") else None
        active = await self._context.offload(
            self._context.registry.rollback, model_id, epoch, request.reason or "rollback", current_principal().name
        )
        return convert.active_release(active)

    async def GetQueueStatus(self, request: wire.GetQueueStatusRequest, context: Any) -> wire.QueueStatus:
        """Depths of all stages and the workers heard of lately."""
        return await self._context.offload(self._queue_status)

    async def ListDeadJobs(self, request: wire.ListDeadJobsRequest, context: Any) -> wire.ListDeadJobsResponse:
        """One keyset page of the jobs that used up their attempts, latest end first."""
        project_id = None if request.parent == ALL_PROJECTS else names.parse_project(request.parent)
        size, listing = page_size(request.page_size), {"dead jobs of": request.parent}
        after = self._context.tokens.decode(request.page_token, listing)
        jobs = await self._context.offload(self._context.jobs.dead, project_id, size + 1, after)
        messages = await self._context.offload(reading.render_page, self._context, jobs[:size], with_answers=False)
        token = ""
        if len(jobs) > len(messages):
            last = jobs[len(messages) - 1]
            token = self._context.tokens.encode((last.end_time or last.update_time, last.id), listing)
        return wire.ListDeadJobsResponse(attribution_jobs=messages, next_page_token=token)

    async def RetryDeadJob(self, request: wire.RetryDeadJobRequest, context: Any) -> job_wire.AttributionJob:
        """Repeat a dead job as a new one."""
        project_id, job_id = names.parse_job(request.name)
        job = await self._context.offload(self._context.jobs.get, project_id, job_id)  # also a ranking job
        fresh = await self._context.offload(self._context.jobs.retry_dead, job.id)
        return await self._context.offload(reading.render, self._context, fresh)

    async def DiscardDeadJob(self, request: wire.DiscardDeadJobRequest, context: Any) -> job_wire.AttributionJob:
        """Put a dead job aside."""
        project_id, job_id = names.parse_job(request.name)
        job = await self._context.offload(self._context.jobs.get, project_id, job_id)  # also a ranking job
        await self._context.offload(self._context.jobs.discard_dead, job.id)
        return await self._context.offload(reading.render, self._context, job)

    async def PauseStage(self, request: wire.PauseStageRequest, context: Any) -> wire.StageStatus:
        """Stop dispatching a stage."""
        return await self._context.offload(self._set_paused, _stage(request.stage), True)

    async def ResumeStage(self, request: wire.ResumeStageRequest, context: Any) -> wire.StageStatus:
        """Dispatch a stage again."""
        return await self._context.offload(self._set_paused, _stage(request.stage), False)

    async def DrainWorker(self, request: wire.DrainWorkerRequest, context: Any) -> wire.Worker:
        """Let one worker take no new work."""
        return await self._context.offload(fleet.drain, self._context.engine, request.worker_id, request.reason)

    async def ResumeWorker(self, request: wire.ResumeWorkerRequest, context: Any) -> wire.Worker:
        """Let a drained worker take work again."""
        return await self._context.offload(fleet.resume, self._context.engine, request.worker_id)

    async def ListJobEvents(self, request: wire.ListJobEventsRequest, context: Any) -> wire.ListJobEventsResponse:
        """What happened to a job."""
        project_id, job_id = names.parse_job(request.name)
        job = await self._context.offload(self._context.jobs.get, project_id, job_id)  # also a ranking job
        events = await self._context.offload(self._context.jobs.events, job.id)
        return wire.ListJobEventsResponse(
            events=[
                wire.JobEvent(
                    time=convert.timestamp(event.at), from_state=event.from_state or "", to_state=event.to_state,
                    stage=event.stage, actor=event.actor, fence=event.fence, reason=event.reason,
                )
                for event in events
            ],
            traceparent=job.traceparent or "",
        )  # fmt: skip

    def _list_releases(self, model_id: str, size: int, page_token: str) -> wire.ListReleasesResponse:
        self._context.catalog.model(model_id)  # ModelNotFound
        listing = {"releases of": model_id}
        after = self._context.tokens.decode_named(page_token, listing)
        active = self._context.registry.active(model_id)
        records = self._context.registry.list(model_id, size + 1, after)
        releases = fitting(convert.release(record) for record in records[:size])
        token = ""
        if len(records) > len(releases):
            last = records[len(releases) - 1]
            token = self._context.tokens.encode((last.created_at, last.release_id), listing)
        return wire.ListReleasesResponse(
            releases=releases, active=convert.active_release(active) if active else None, next_page_token=token
        )

    def _queue_status(self) -> wire.QueueStatus:
        with transaction(self._context.engine) as connection:
            workers = fleet.workers(connection)
        return wire.QueueStatus(stages=[_status(depth) for depth in self._context.jobs.depths()], workers=workers)

    def _set_paused(self, stage: Stage, paused: bool) -> wire.StageStatus:
        self._context.jobs.set_paused(stage, paused)
        return next(_status(depth) for depth in self._context.jobs.depths() if depth.stage is stage)


def _stage(name: str) -> Stage:
    try:
        return Stage(name)
    except ValueError as error:
        raise InvalidRequest("stage", f"must be one of {', '.join(Stage)}", value=name[:80]) from error


def _status(depth: StageDepth) -> wire.StageStatus:
    status = wire.StageStatus(stage=depth.stage.value, queued=depth.queued, running=depth.running, paused=depth.paused)
    if depth.queued:
        status.oldest_wait.FromTimedelta(timedelta(seconds=depth.oldest_wait_s))
    return status
