"""Queries from plan to queue: generate the pictures, choose candidates, commit queries and their one job together.

Why it exists: a query without its ranking job would never be labelled, and a job without its queries
could not run; all rows are written in one transaction, and no query is ever in two open jobs.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, Select, func, select

from byline.catalog.blobs import BlobStore
from byline.db.models import Base
from byline.db.session import transaction
from byline.failpoints import failpoint
from byline.jobs.model import Job, NewJob
from byline.jobs.states import TERMINAL, Kind, Tier
from byline.jobs.store import JobStore
from byline.rankings.controls import PROJECT, hold_rankings, is_paused, take_turn
from byline.rankings.curated import (
    Repeatable,
    StoredShortlist,
    active_release_id,
    add_choice,
    add_repeat,
    add_shortlist,
)
from byline.rankings.live import intake_asked
from byline.rankings.store import REPEAT_PREFIX, RankingStore
from services.curation.plan import PlannedQuery
from services.curation.shortlist import Shortlist

#: Seconds a ranking job may wait: ten years. Nobody waits for its answer, and one that a pause or busy workers held is
#: no failure.
TIME_TO_LIVE = 10 * 365 * 86_400.0
#: A query whose ranking ended this often without a label is left alone: it would fail for ever.
MOST_ATTEMPTS = 5
_QUERIES = Base.metadata.tables["queries"]
_RANKINGS = Base.metadata.tables["rankings"]
_JOBS = Base.metadata.tables["jobs"]
_JOB_QUERIES = Base.metadata.tables["job_queries"]
_ENDED: ColumnElement[bool] = _JOBS.c.state.in_(sorted(TERMINAL))


@dataclass(frozen=True)
class Labelling:
    """How a query is labelled: teacher, noise draws per item, and the rest of the teacher's settings."""

    teacher: str
    draws: int
    teacher_settings: Mapping[str, Any]
    #: Of the noise of a label that repeats another; fixed, so that workers keep one teacher more and not many.
    repeat_seed: int = 104_729


@dataclass(frozen=True)
class Producer:
    """Turns planned queries into ranking jobs.

    ``generate`` gives PNG bytes of one sample (of a live query: those the client sent); ``candidates`` the items to
    rank for it, None for the whole corpus (then nothing is chosen by picture).
    """

    engine: Engine
    store: JobStore
    rankings: RankingStore
    blobs: BlobStore
    model_id: str
    labelling: Labelling
    generate: Callable[[PlannedQuery], bytes]
    candidates: Callable[[PlannedQuery, bytes], Shortlist] | None
    #: Whether to generate no more (the service is to end, or paused): what there is so far becomes a job, and the rest
    #: another day.
    stopping: Callable[[], bool] = lambda: False

    def known(self) -> frozenset[tuple[str, int]]:
        """(prompt, seed) of every query that needs no job: it has a ranking (from the snapshot or from this
        service), a ranking job that has not ended, or ``MOST_ATTEMPTS`` jobs of this teacher that gave none."""
        ranked = select(_RANKINGS.c.query_id).where(_RANKINGS.c.model_id == self.model_id)
        attempts = func.count().filter(_JOB_QUERIES.c.teacher == self.labelling.teacher)
        tried = _jobs_by_query().having(func.bool_or(~_ENDED) | (attempts >= MOST_ATTEMPTS))
        return self._keys(_QUERIES.c.id.in_(ranked) | _QUERIES.c.id.in_(tried))

    def failed(self) -> frozenset[tuple[str, int]]:
        """(prompt, seed) of every query of which a ranking job has ended. One that is not ``known`` is to be asked
        for alone: whatever ended its job must not end that of other queries, too."""
        return self._keys(_QUERIES.c.id.in_(_jobs_by_query().having(func.bool_or(_ENDED))))

    def produce(self, batch: Sequence[PlannedQuery]) -> uuid.UUID:
        """Enqueue the ranking of some planned queries as one job; returns its id.

        Queries with an open job are left to that (its id is returned if it has all of them), so doing it again
        makes another job only if the ones before have ended (expired, failed, cancelled).
        """
        pictures: list[bytes] = []
        for planned in batch:
            if pictures and self.stopping():
                break
            pictures.append(self._picture(planned))
        failpoint("curation.after_generate")
        batch = batch[: len(pictures)]
        shortlists = [self._shortlist(planned, picture) for planned, picture in zip(batch, pictures, strict=True)]
        lists = [None if one is None else [str(i) for i in one.item_ids.tolist()] for one in shortlists]
        digests = [self.blobs.put(picture) for picture in pictures]
        failpoint("curation.after_blobs")
        with transaction(self.engine) as connection:
            take_turn(connection)
            ids = [
                self.rankings.add_query(
                    connection,
                    model_id=self.model_id,
                    prompt=planned.prompt,
                    seed=planned.seed,
                    split=planned.split,
                    near_duplicate_group=planned.near_duplicate_group,
                    image_sha256=digest,
                    source=planned.source,
                )
                for planned, digest in zip(batch, digests, strict=True)
            ]
            failpoint("curation.after_queries")
            for planned, query_id in zip(batch, ids, strict=True):
                # A live query is a test of the release that answered it, any other of the one that answers now.
                release = planned.release_id or active_release_id(connection, self.model_id)
                add_choice(connection, query_id, self.model_id, planned.chosen_for, release)
                if planned.asked_by is not None:
                    intake_asked(connection, planned.asked_by, query_id)
            taken = _open_jobs(connection, ids)
            left = [number for number, query_id in enumerate(ids) if query_id not in taken]
            if not left:
                return taken[ids[0]]
            new = self._job(
                connection, batch[left[0]].prompt, [ids[number] for number in left], [lists[number] for number in left]
            )
            for number in left:
                shortlist = shortlists[number]
                if shortlist is not None:
                    add_shortlist(connection, ids[number], str(new.payload["candidate_set"]), _stored(shortlist))
            job = self._enqueued(connection, new)
            failpoint("curation.before_commit")
        failpoint("curation.after_commit")
        return job.id

    def repeat(self, batch: Sequence[Repeatable]) -> uuid.UUID:
        """Enqueue the ranking of labelled queries once more, over the same items under other noise; the job's id."""
        name = f"{REPEAT_PREFIX}{len(batch[0].item_ids)}"
        digest = hashlib.sha256(",".join(sorted(str(one.query_id) for one in batch)).encode()).hexdigest()[:32]
        new = NewJob(
            project_id=PROJECT, request_id=f"repeat/{digest}/{self.labelling.teacher}", model_id=self.model_id,
            prompt=batch[0].prompt, kind=Kind.RANKING, tier=Tier.VERIFIED, top_k=1,
            candidates=max(len(one.item_ids) for one in batch), ttl_s=TIME_TO_LIVE,
            payload={
                "query_ids": [str(one.query_id) for one in batch], "teacher": self.labelling.teacher,
                "draws": self.labelling.draws, "candidate_set": name,
                "teacher_settings": {**self.labelling.teacher_settings, "seed": self.labelling.repeat_seed},
                "candidate_ids_by_query": [[str(i) for i in one.item_ids.tolist()] for one in batch],
            },
        )  # fmt: skip
        with transaction(self.engine) as connection:
            take_turn(connection)
            job = self._enqueued(connection, new)
            for one in batch:
                add_repeat(connection, one.query_id, self.model_id, name, job.id)
        return job.id

    def _enqueued(self, connection: Connection, new: NewJob) -> Job:
        """The job, in the caller's transaction; held if curation was paused while its pictures were generated."""
        [(job, _created)] = self.store.create_within(connection, [new])
        if is_paused(connection, self.model_id):
            hold_rankings(connection, self.model_id)
        return job

    def _job(
        self, connection: Connection, prompt: str, ids: Sequence[uuid.UUID], lists: Sequence[list[str] | None]
    ) -> NewJob:
        digest = hashlib.sha256(",".join(sorted(map(str, ids))).encode()).hexdigest()[:32]
        payload: dict[str, Any] = {
            "query_ids": [str(query_id) for query_id in ids],
            "teacher": self.labelling.teacher,
            "draws": self.labelling.draws,
            "teacher_settings": dict(self.labelling.teacher_settings),
        }
        if self.candidates is not None:
            payload["candidate_set"] = f"nearest-{len(lists[0] or ())}"
            if all(of_query == lists[0] for of_query in lists):
                payload["candidate_ids"] = lists[0]
            else:
                payload["candidate_ids_by_query"] = list(lists)
        return NewJob(
            project_id=PROJECT,
            request_id=f"rank/{digest}/{self.labelling.teacher}/{_ended_jobs(connection, ids)}",
            model_id=self.model_id,
            prompt=prompt,
            kind=Kind.RANKING,
            tier=Tier.VERIFIED,
            top_k=1,
            candidates=max(1, *(len(of_query or ()) for of_query in lists)),
            ttl_s=TIME_TO_LIVE,
            payload=payload,
        )

    def _picture(self, planned: PlannedQuery) -> bytes:
        return self.generate(planned) if planned.image_sha256 is None else self.blobs.get(planned.image_sha256)

    def _shortlist(self, planned: PlannedQuery, picture: bytes) -> Shortlist | None:
        return None if self.candidates is None else self.candidates(planned, picture)

    def _keys(self, condition: ColumnElement[bool]) -> frozenset[tuple[str, int]]:
        statement = select(_QUERIES.c.prompt, _QUERIES.c.seed).where(_QUERIES.c.model_id == self.model_id, condition)
        with transaction(self.engine) as connection:
            return frozenset((prompt, int(seed)) for prompt, seed in connection.execute(statement))


def _stored(shortlist: Shortlist) -> StoredShortlist:
    return StoredShortlist(
        shortlist.nearest, shortlist.by_head, shortlist.explored, shortlist.outside, shortlist.release_id
    )


def _jobs_by_query() -> Select[tuple[uuid.UUID]]:
    """Ids of queries that ranking jobs are or were about, grouped, for conditions on their jobs."""
    return (
        select(_JOB_QUERIES.c.query_id)
        .join(_JOBS, _JOBS.c.id == _JOB_QUERIES.c.job_id)
        .where(_JOBS.c.project_id == PROJECT)
        .group_by(_JOB_QUERIES.c.query_id)
    )


def _open_jobs(connection: Connection, query_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, uuid.UUID]:
    """The open ranking job of each of these queries that has one."""
    statement = (
        select(_JOB_QUERIES.c.query_id, _JOB_QUERIES.c.job_id)
        .join(_JOBS, _JOBS.c.id == _JOB_QUERIES.c.job_id)
        .where(_JOBS.c.project_id == PROJECT, ~_ENDED, _JOB_QUERIES.c.query_id.in_(query_ids))
    )
    return {query_id: job_id for query_id, job_id in connection.execute(statement)}


def _ended_jobs(connection: Connection, query_ids: Sequence[uuid.UUID]) -> int:
    """How many ranking jobs of these queries have ended: the number of the next attempt."""
    statement = (
        select(func.count(func.distinct(_JOBS.c.id)))
        .join(_JOB_QUERIES, _JOBS.c.id == _JOB_QUERIES.c.job_id)
        .where(_JOBS.c.project_id == PROJECT, _ENDED, _JOB_QUERIES.c.query_id.in_(query_ids))
    )
    return int(connection.execute(statement).scalar_one())
