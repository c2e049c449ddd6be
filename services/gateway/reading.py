"""Jobs as clients may see them now.

Why it exists: every way of reading a job (Get, List, Watch, Attribute) must leave withdrawn items out. The
answers are read first and the withdrawals after them, so a withdrawal that was acknowledged before the call
began is always seen.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from attribution.v1 import attribution_job_pb2 as wire
from byline.errors import JobNotFound
from byline.jobs.model import Job
from byline.jobs.states import Kind
from services.gateway import convert
from services.gateway.context import GatewayContext


def row(context: GatewayContext, project_id: str, job_id: uuid.UUID) -> Job:
    """The row of a client's job. JobNotFound also for another project's jobs and for curation's."""
    job = context.jobs.get(project_id, job_id)
    if job.kind is not Kind.ATTRIBUTION:
        raise JobNotFound(f"project {project_id} has no job {job_id}", job=job_id)
    return job


def render(context: GatewayContext, job: Job, *, with_answers: bool = True) -> wire.AttributionJob:
    """The message of one row."""
    return render_all(context, [job], with_answers=with_answers)[0]


def render_all(context: GatewayContext, jobs: Iterable[Job], *, with_answers: bool) -> list[wire.AttributionJob]:
    """The messages of many rows. Results are read only where a job can have some that will be shown."""
    found = [
        (job, list(context.jobs.results(job.id).values()) if with_answers or job.is_terminal else []) for job in jobs
    ]
    withdrawn: dict[str, frozenset[int]] = {}
    messages = []
    for job, results in found:
        corpus_id = context.models.corpus_of(job.model_id)
        if results and corpus_id not in withdrawn:
            withdrawn[corpus_id] = context.catalog.withdrawn(corpus_id)
        hidden = withdrawn.get(corpus_id, frozenset())
        messages.append(convert.job(job, results, corpus_id, hidden, with_answers=with_answers))
    return messages
