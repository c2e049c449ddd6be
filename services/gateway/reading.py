"""Jobs as clients may see them now.

Why it exists: every way of reading a job (Get, List, Watch, Attribute) must leave withdrawn items out. The
answers are read first and the withdrawals after them (each statement sees what was committed before it), so a
withdrawal that was acknowledged before the call began is always seen. No transaction holds them together.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence

from sqlalchemy import Connection

from attribution.v1 import attribution_job_pb2 as wire
from byline.db.session import single_statements
from byline.errors import JobNotFound
from byline.jobs.model import Job, StageResult
from byline.jobs.states import Kind, Stage
from services.gateway import convert
from services.gateway.context import GatewayContext
from services.gateway.paging import RESPONSE_BYTES, fitting

#: Rows of a page that are read and written together.
_TOGETHER = 25


def row(context: GatewayContext, project_id: str, job_id: uuid.UUID) -> Job:
    """The row of a client's job. JobNotFound also for another project's jobs and for curation's."""
    with single_statements(context.engine) as connection:
        return _row(context, connection, project_id, job_id)


def changed(
    context: GatewayContext, project_id: str, job_id: uuid.UUID, seen: int, *, with_answers: bool = True
) -> tuple[Job, wire.AttributionJob | None]:
    """A client's job, and its message if its revision is above ``seen`` or it has ended. JobNotFound as ``row``.

    The end is told whatever was seen: a claim that Postgres forgot in a crash took its revision with it.
    """
    with single_statements(context.engine) as connection:
        job, results = _found(context, connection, project_id, job_id)
        if job.revision <= seen and not job.is_terminal:
            return job, None
        return job, _messages(context, connection, [(job, results)], with_answers)[0]


def first_answer(context: GatewayContext, project_id: str, job_id: uuid.UUID) -> wire.AttributionJob | None:
    """A client's job once its lookup is over. JobNotFound also if Postgres crashed before the job was on its disk."""
    with single_statements(context.engine) as connection:
        job, results = _found(context, connection, project_id, job_id)
        return None if in_lookup(job) else _messages(context, connection, [(job, results)], True)[0]


def kept(context: GatewayContext, project_id: str, job_id: uuid.UUID) -> wire.AttributionJob:
    """A client's job that will survive a crash: flushed first, and only then looked for. JobNotFound as above."""
    context.jobs.flush()
    with single_statements(context.engine) as connection:
        return _messages(context, connection, [_found(context, connection, project_id, job_id)], True)[0]


def in_lookup(job: Job) -> bool:
    """Whether the job has no answer yet and may still get one from its lookup."""
    return not job.is_terminal and job.stage is Stage.LOOKUP


def render(context: GatewayContext, job: Job, *, with_answers: bool = True) -> wire.AttributionJob:
    """The message of one row."""
    return render_all(context, [job], with_answers=with_answers)[0]


def render_all(context: GatewayContext, jobs: Iterable[Job], *, with_answers: bool) -> list[wire.AttributionJob]:
    """The messages of many rows. Results are read only where a job can have some that will be shown."""
    with single_statements(context.engine) as connection:
        return _render(context, connection, jobs, with_answers)


def render_page(context: GatewayContext, jobs: Sequence[Job], *, with_answers: bool) -> list[wire.AttributionJob]:
    """The messages of the first rows, as many as one response may hold."""
    return fitting(
        message for start in range(0, len(jobs), _TOGETHER)
        for message in render_all(context, jobs[start : start + _TOGETHER], with_answers=with_answers)
    )  # fmt: skip


def render_batch(context: GatewayContext, jobs: Sequence[Job]) -> list[wire.AttributionJob]:
    """The messages of all rows, with answers while one response may hold them."""
    messages = render_all(context, jobs, with_answers=False)
    left = RESPONSE_BYTES - sum(message.ByteSize() for message in messages)
    answered = [place for place, job in enumerate(jobs) if _may_have(job, with_answers=True)]
    for place in answered:
        message = render(context, jobs[place])
        left -= message.ByteSize() - messages[place].ByteSize()
        if left < 0:
            break
        messages[place] = message
    return messages


def _row(context: GatewayContext, connection: Connection, project_id: str, job_id: uuid.UUID) -> Job:
    return _visible(context.jobs.find_within(connection, job_id), project_id, job_id)


def _found(
    context: GatewayContext, connection: Connection, project_id: str, job_id: uuid.UUID
) -> tuple[Job, Sequence[StageResult]]:
    job, results = context.jobs.find_with_results(connection, job_id) or (None, [])
    return _visible(job, project_id, job_id), results


def _visible(job: Job | None, project_id: str, job_id: uuid.UUID) -> Job:
    if job is None or job.project_id != project_id or job.kind is not Kind.ATTRIBUTION:
        raise JobNotFound(f"project {project_id} has no job {job_id}", job=job_id)
    return job


def _render(
    context: GatewayContext, connection: Connection, jobs: Iterable[Job], with_answers: bool
) -> list[wire.AttributionJob]:
    """Results are read only where a job can have some: a waiting lookup has none."""
    found = [
        (job, list(context.jobs.results_within(connection, job.id).values()) if _may_have(job, with_answers) else [])
        for job in jobs
    ]
    return _messages(context, connection, found, with_answers)


def _messages(
    context: GatewayContext,
    connection: Connection,
    found: Sequence[tuple[Job, Sequence[StageResult]]],
    with_answers: bool,
) -> list[wire.AttributionJob]:
    """Withdrawn items are looked up here, after the answers were read."""
    named = {
        int(entry["item_id"]) for _, results in found for result in results
        for entry in result.result.get("influences", ())
    }  # fmt: skip
    hidden = context.catalog.withdrawn_among(connection, sorted(named)) if with_answers else frozenset()
    return [
        convert.job(job, results, context.models.corpus_of(job.model_id, connection), hidden, with_answers=with_answers)
        for job, results in found
    ]


def _may_have(job: Job, with_answers: bool) -> bool:
    return job.is_terminal or (with_answers and not in_lookup(job))
