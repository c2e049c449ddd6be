"""The client of people who keep the system running: dead jobs, a job's history, draining workers.

Why it exists: these calls are for operators, so they do not stand between a platform and the three calls it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from attribution.v1 import operator_service_pb2 as wire
from byline.client import values
from byline.client import wire as reading
from byline.client.calls import Call
from byline.client.sync import Client

_SERVICE = "OperatorService"
ALL_PROJECTS = "projects/-"
_PAGE = 1_000


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One change of a job."""

    time: datetime
    from_state: str
    to_state: str
    stage: str
    actor: str
    fence: int
    reason: str


@dataclass(frozen=True, slots=True)
class JobHistory:
    """What happened to a job, oldest first, and the trace its log lines carry."""

    events: tuple[JobEvent, ...]
    traceparent: str


class OperatorClient(Client):
    """A ``Client`` that can do what operators do, too."""

    def stage(self, name: str, paused: bool) -> values.StageStatus:
        """Pause a stage or end its pause; returns how it stands."""
        if paused:
            return self._do(Call(_SERVICE, "PauseStage", wire.PauseStageRequest(stage=name), reading.stage_status))
        return self._do(Call(_SERVICE, "ResumeStage", wire.ResumeStageRequest(stage=name), reading.stage_status))

    def drain(self, worker_id: str, reason: str = "") -> values.WorkerStatus:
        """Let a worker take no new work. WorkerNotFound if none is called so."""
        request = wire.DrainWorkerRequest(worker_id=worker_id, reason=reason)
        return self._do(Call(_SERVICE, "DrainWorker", request, reading.worker_status))

    def resume_worker(self, worker_id: str) -> values.WorkerStatus:
        """Let a drained worker take work again."""
        request = wire.ResumeWorkerRequest(worker_id=worker_id)
        return self._do(Call(_SERVICE, "ResumeWorker", request, reading.worker_status))

    def dead_jobs(self, project: str | None = None, limit: int | None = 50) -> Sequence[values.Job]:
        """Jobs that used up their attempts, latest first; of all projects if none is named, all if ``limit`` is None.
        """
        request = wire.ListDeadJobsRequest(parent=f"projects/{project}" if project else ALL_PROJECTS)
        found: list[values.Job] = []
        while limit is None or len(found) < limit:
            request.page_size = _PAGE if limit is None else min(limit - len(found), _PAGE)
            page, request.page_token = self._do(Call(_SERVICE, "ListDeadJobs", request, _dead_page))
            found += page
            if not request.page_token:
                break
        return found

    def retry(self, job: str) -> values.Job:
        """Repeat a dead job as a new one, which is returned. JobNotRetryable if it is not dead."""
        request = wire.RetryDeadJobRequest(name=self._calls.job_name(job))
        return self._do(Call(_SERVICE, "RetryDeadJob", request, reading.job))

    def discard(self, job: str) -> values.Job:
        """Put a dead job aside. JobNotRetryable if it is not dead."""
        request = wire.DiscardDeadJobRequest(name=self._calls.job_name(job))
        return self._do(Call(_SERVICE, "DiscardDeadJob", request, reading.job))

    def history(self, job: str) -> JobHistory:
        """Everything that happened to a job."""
        request = wire.ListJobEventsRequest(name=self._calls.job_name(job))
        return self._do(Call(_SERVICE, "ListJobEvents", request, _history))


def _dead_page(message: wire.ListDeadJobsResponse) -> tuple[list[values.Job], str]:
    return [reading.job(job) for job in message.attribution_jobs], message.next_page_token


def _history(message: wire.ListJobEventsResponse) -> JobHistory:
    events = tuple(
        JobEvent(e.time.ToDatetime(UTC), e.from_state, e.to_state, e.stage, e.actor, e.fence, e.reason)
        for e in message.events
    )
    return JobHistory(events, message.traceparent)
