"""One query from plan to queue: generate the picture, choose candidates, commit query and job together.

Why it exists: a query without its ranking job would never be labelled, and a job without its query
could not run; both rows are written in one transaction, and the same plan never makes one twice.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Connection, Engine, String, cast, func, select

from byline.catalog.blobs import BlobStore
from byline.db.models import Base
from byline.db.session import transaction
from byline.jobs.model import NewJob
from byline.jobs.states import TERMINAL, Kind, Tier
from byline.jobs.store import JobStore
from byline.rankings.store import RankingStore
from services.curation.plan import PlannedQuery

#: Ranking jobs belong to no client; quotas and listings of clients never see them.
PROJECT = "byline-curation"
#: A query whose ranking ended this often without a label is left alone: it would fail for ever.
MOST_ATTEMPTS = 5
_QUERIES = Base.metadata.tables["queries"]
_RANKINGS = Base.metadata.tables["rankings"]
_JOBS = Base.metadata.tables["jobs"]
_ENDED: ColumnElement[bool] = _JOBS.c.state.in_(sorted(TERMINAL))


@dataclass(frozen=True)
class Labelling:
    """How a query is labelled: teacher, noise draws per item, and the rest of the teacher's settings."""

    teacher: str
    draws: int
    teacher_settings: Mapping[str, Any]


@dataclass(frozen=True)
class Producer:
    """Turns planned queries into ranking jobs.

    ``generate`` gives PNG bytes of one sample; ``candidates`` the item ids to rank for it.
    """

    engine: Engine
    store: JobStore
    rankings: RankingStore
    blobs: BlobStore
    model_id: str
    labelling: Labelling
    generate: Callable[[PlannedQuery], bytes]
    candidates: Callable[[PlannedQuery, bytes], NDArray[np.int64]]
    job_ttl_s: float

    def known(self) -> frozenset[tuple[str, int]]:
        """(prompt, seed) of every query that needs no job: it has a ranking (from the snapshot or from this
        service), a ranking job that has not ended, or ``MOST_ATTEMPTS`` jobs of this teacher that gave none."""
        ranked = select(_RANKINGS.c.query_id).where(_RANKINGS.c.model_id == self.model_id)
        # The parts of a request id, see ``produce``: reading the payloads, with all their candidates, is slow.
        query_id, teacher = (func.split_part(_JOBS.c.request_id, "/", part) for part in (2, 3))
        attempts = func.count().filter(teacher == self.labelling.teacher)
        tried = (
            select(query_id)
            .where(_JOBS.c.project_id == PROJECT, _JOBS.c.kind == Kind.RANKING)
            .group_by(query_id)
            .having(func.bool_or(~_ENDED) | (attempts >= MOST_ATTEMPTS))
        )
        statement = select(_QUERIES.c.prompt, _QUERIES.c.seed).where(
            _QUERIES.c.model_id == self.model_id,
            _QUERIES.c.id.in_(ranked) | cast(_QUERIES.c.id, String).in_(tried),
        )
        with transaction(self.engine) as connection:
            return frozenset((prompt, int(seed)) for prompt, seed in connection.execute(statement))

    def produce(self, planned: PlannedQuery) -> uuid.UUID:
        """Enqueue the ranking of one planned query; returns the job's id.

        Doing it again makes another job only if the ones before have ended (expired, failed, cancelled).
        """
        picture = self.generate(planned)
        ids: Sequence[int] = self.candidates(planned, picture).tolist()
        digest = self.blobs.put(picture)
        with transaction(self.engine) as connection:
            query_id = self.rankings.add_query(
                connection,
                model_id=self.model_id,
                prompt=planned.prompt,
                seed=planned.seed,
                split=planned.split,
                near_duplicate_group=planned.near_duplicate_group,
                image_sha256=digest,
                source="corpus",
            )
            new = NewJob(
                project_id=PROJECT,
                request_id=f"rank/{query_id}/{self.labelling.teacher}/{_ended_jobs(connection, query_id)}",
                model_id=self.model_id,
                prompt=planned.prompt,
                kind=Kind.RANKING,
                image_sha256=digest,
                tier=Tier.VERIFIED,
                top_k=1,
                candidates=len(ids),
                ttl_s=self.job_ttl_s,
                payload={
                    "query_id": str(query_id),
                    "teacher": self.labelling.teacher,
                    "draws": self.labelling.draws,
                    "teacher_settings": dict(self.labelling.teacher_settings),
                    "candidate_ids": [str(i) for i in ids],
                    "candidate_set": f"nearest-{len(ids)}",
                },
            )
            [(job, _created)] = self.store.create_within(connection, [new])
        return job.id


def _ended_jobs(connection: Connection, query_id: uuid.UUID) -> int:
    """How many ranking jobs of this query have ended: the number of the next attempt."""
    of_query = _JOBS.c.request_id.startswith(f"rank/{query_id}/", autoescape=True)
    statement = select(func.count()).select_from(_JOBS).where(_JOBS.c.project_id == PROJECT, of_query, _ENDED)
    return int(connection.execute(statement).scalar_one())
