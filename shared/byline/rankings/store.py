"""Queries and their rankings in Postgres, as arrays.

Why it exists: curation asks for rankings, workers write them in the transaction that completes the job,
and the trainer reads them all at once; arrays are stored raw (little-endian, int64, int32, float32) because τ and its
error must come back bit for bit. Adding the same query or ranking again changes nothing, so both
writers may run twice.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Engine, RowMapping, Table, func, select
from sqlalchemy.dialects.postgresql import insert

from byline.db.models import QueryRow, RankingRow
from byline.db.session import transaction
from byline.errors import LabelsNotUsable

QUERIES: Table = QueryRow.metadata.tables["queries"]
RANKINGS: Table = RankingRow.metadata.tables["rankings"]

SPLITS = ("train", "validation", "test")
#: Candidate sets of rankings that repeat another under other noise; they measure labels and are no labels themselves.
REPEAT_PREFIX = "repeat-"
NOT_A_REPEAT = RANKINGS.c.candidate_set.not_like(REPEAT_PREFIX + "%")


class RankingLike(Protocol):
    """What a teacher says of one query; ``byline.teachers.Ranking`` is one."""

    @property
    def item_ids(self) -> NDArray[np.int64]:
        """int64 [n]."""
        ...

    @property
    def tau(self) -> NDArray[np.float32]:
        """float32 [n]; higher = more influential."""
        ...

    @property
    def standard_error(self) -> NDArray[np.float32]:
        """float32 [n]; NaN if unknown."""
        ...

    @property
    def tau_halves(self) -> NDArray[np.float32] | None:
        """float32 [2, n] from disjoint noise, or None."""
        ...

    @property
    def samples(self) -> NDArray[np.int32] | None:
        """int32 [n], loss evaluations each τ rests on, or None where nobody counted."""
        ...

    @property
    def draws(self) -> int:
        """Noise draws per item: the budget, where ``samples`` says what was spent."""
        ...

    @property
    def teacher_id(self) -> str:
        """Which teacher, with which settings, on which model."""
        ...

    @property
    def candidate_set(self) -> str:
        """The name of the list of candidates."""
        ...


@dataclass(frozen=True)
class Query:
    """One row of ``queries``."""

    id: uuid.UUID
    model_id: str
    prompt: str
    seed: int
    split: str
    near_duplicate_group: int
    image_sha256: str
    source: str
    created_at: datetime


@dataclass(frozen=True, eq=False)
class LabelledQuery:
    """A query with one ranking of it; arrays are [n] in the order of ``item_ids``, halves [2, n].

    ``samples``: loss evaluations each τ rests on; None in rankings from before they were counted.
    """

    query_id: uuid.UUID
    prompt: str
    split: str
    near_duplicate_group: int
    image_sha256: str
    item_ids: NDArray[np.int64]
    tau: NDArray[np.float32]
    standard_error: NDArray[np.float32]
    tau_halves: NDArray[np.float32] | None
    seed: int
    candidate_set: str
    draws: int
    samples: NDArray[np.int32] | None = None
    #: corpus, file or live.
    source: str = "corpus"


class RankingStore:
    """Queries and rankings. ``new_id`` gives the ids of new rows. Methods may raise ``DatabaseUnavailable``."""

    def __init__(self, engine: Engine, *, new_id: Callable[[], uuid.UUID] = uuid.uuid4) -> None:
        self._engine = engine
        self._new_id = new_id

    def add_query(
        self,
        connection: Connection,
        *,
        model_id: str,
        prompt: str,
        seed: int,
        split: str,
        near_duplicate_group: int,
        image_sha256: str,
        source: str,
    ) -> uuid.UUID:
        """The id of this (model, prompt, seed), inserted if new, in the caller's transaction."""
        values = {
            "id": self._new_id(),
            "model_id": model_id,
            "prompt": prompt,
            "seed": seed,
            "split": split,
            "near_duplicate_group": near_duplicate_group,
            "image_sha256": image_sha256,
            "source": source,
        }
        statement = insert(QUERIES).values(values).on_conflict_do_nothing().returning(QUERIES.c.id)
        added: uuid.UUID | None = connection.execute(statement).scalar()
        if added is not None:
            return added
        found = select(QUERIES.c.id).where(
            QUERIES.c.model_id == model_id, QUERIES.c.prompt == prompt, QUERIES.c.seed == seed
        )
        existing: uuid.UUID = connection.execute(found).scalar_one()
        return existing

    def add_ranking(
        self, connection: Connection, query_id: uuid.UUID, ranking: RankingLike, job_id: uuid.UUID | None = None
    ) -> bool:
        """Write a ranking in the caller's transaction; False if this query has one of its kind already.

        Raises ``LabelsNotUsable`` if the arrays disagree in length, hold a non-finite τ, or name an item twice.
        """
        n = len(ranking.item_ids)
        halves = ranking.tau_halves
        _check(ranking, n)
        model_id = select(QUERIES.c.model_id).where(QUERIES.c.id == query_id).scalar_subquery()
        values = {
            "id": self._new_id(),
            "query_id": query_id,
            "model_id": model_id,
            "teacher_id": ranking.teacher_id,
            "candidate_set": ranking.candidate_set,
            "n": n,
            "item_ids": np.asarray(ranking.item_ids, dtype="<i8").tobytes(),
            "tau": np.asarray(ranking.tau, dtype="<f4").tobytes(),
            "standard_error": np.asarray(ranking.standard_error, dtype="<f4").tobytes(),
            "tau_halves": None if halves is None else np.asarray(halves, dtype="<f4").tobytes(),
            "samples": None if ranking.samples is None else np.asarray(ranking.samples, dtype="<i4").tobytes(),
            "draws": ranking.draws,
            "job_id": job_id,
        }
        statement = (
            insert(RANKINGS)
            .values(values)
            .on_conflict_do_nothing(index_elements=["query_id", "teacher_id", "candidate_set"])
            .returning(RANKINGS.c.id)
        )
        return connection.execute(statement).scalar() is not None

    def query(self, query_id: uuid.UUID) -> Query | None:
        """The query with this id."""
        with transaction(self._engine) as connection:
            row = connection.execute(select(QUERIES).where(QUERIES.c.id == query_id)).mappings().first()
        return None if row is None else Query(**row)

    def splits_of_prompts(self, model_id: str) -> dict[str, frozenset[str]]:
        """The splits in which queries of each prompt are stored: one each, unless something went wrong before."""
        statement = select(QUERIES.c.prompt, QUERIES.c.split).where(QUERIES.c.model_id == model_id).distinct()
        found: dict[str, frozenset[str]] = {}
        with transaction(self._engine) as connection:
            for prompt, split in connection.execute(statement):
                found[prompt] = found.get(prompt, frozenset()) | {split}
        return found

    def counts(self, model_id: str, teacher_id: str | None = None) -> dict[str, int]:
        """Queries with at least one ranking (of this teacher, if named), by split; every split is a key."""
        statement = (
            select(QUERIES.c.split, func.count(func.distinct(QUERIES.c.id)))
            .join(RANKINGS, RANKINGS.c.query_id == QUERIES.c.id)
            .where(RANKINGS.c.model_id == model_id, NOT_A_REPEAT)
            .group_by(QUERIES.c.split)
        )
        if teacher_id is not None:
            statement = statement.where(RANKINGS.c.teacher_id == teacher_id)
        with transaction(self._engine) as connection:
            found = {split: count for split, count in connection.execute(statement)}
        return {split: int(found.get(split, 0)) for split in SPLITS}

    def teachers(self, model_id: str) -> Mapping[str, int]:
        """How many rankings each teacher gave for the model."""
        statement = (
            select(RANKINGS.c.teacher_id, func.count())
            .where(RANKINGS.c.model_id == model_id, NOT_A_REPEAT)
            .group_by(RANKINGS.c.teacher_id)
            .order_by(RANKINGS.c.teacher_id)
        )
        with transaction(self._engine) as connection:
            return {teacher_id: int(count) for teacher_id, count in connection.execute(statement)}

    def load(self, model_id: str, teacher_id: str, splits: Collection[str] = SPLITS) -> list[LabelledQuery]:
        """Every ranking of this teacher for queries of these splits, in an order that never changes; no repeats."""
        statement = (
            select(
                QUERIES.c.id,
                QUERIES.c.prompt,
                QUERIES.c.seed,
                QUERIES.c.split,
                QUERIES.c.near_duplicate_group,
                QUERIES.c.image_sha256,
                QUERIES.c.source,
                RANKINGS.c.item_ids,
                RANKINGS.c.tau,
                RANKINGS.c.standard_error,
                RANKINGS.c.tau_halves,
                RANKINGS.c.samples,
                RANKINGS.c.candidate_set,
                RANKINGS.c.draws,
            )
            .join(RANKINGS, RANKINGS.c.query_id == QUERIES.c.id)
            .where(
                RANKINGS.c.model_id == model_id,
                RANKINGS.c.teacher_id == teacher_id,
                QUERIES.c.split.in_(list(splits)),
                NOT_A_REPEAT,
            )
            .order_by(QUERIES.c.created_at, QUERIES.c.id, RANKINGS.c.candidate_set)
        )
        with transaction(self._engine) as connection:
            return [_labelled(row) for row in connection.execute(statement).mappings()]


def _labelled(row: RowMapping) -> LabelledQuery:
    halves = row["tau_halves"]
    return LabelledQuery(
        query_id=row["id"],
        prompt=row["prompt"],
        split=row["split"],
        near_duplicate_group=row["near_duplicate_group"],
        image_sha256=row["image_sha256"],
        item_ids=np.frombuffer(row["item_ids"], dtype="<i8"),
        tau=np.frombuffer(row["tau"], dtype="<f4"),
        standard_error=np.frombuffer(row["standard_error"], dtype="<f4"),
        tau_halves=None if halves is None else np.frombuffer(halves, dtype="<f4").reshape(2, -1),
        seed=row["seed"],
        candidate_set=row["candidate_set"],
        draws=row["draws"],
        samples=None if row["samples"] is None else np.frombuffer(row["samples"], dtype="<i4"),
        source=row["source"],
    )


def _check(ranking: RankingLike, n: int) -> None:
    halves = ranking.tau_halves
    counted = ranking.samples is None or ranking.samples.shape == (n,)
    shapes_agree = ranking.tau.shape == (n,) and ranking.standard_error.shape == (n,) and counted
    if n == 0 or not shapes_agree or (halves is not None and halves.shape != (2, n)):
        raise LabelsNotUsable("a ranking needs item ids, tau, standard errors and samples of one length", n=n)
    if not np.isfinite(ranking.tau).all():
        raise LabelsNotUsable("a ranking holds a tau that is not finite", n=n)
    if len(np.unique(ranking.item_ids)) != n:
        raise LabelsNotUsable("a ranking names an item twice", n=n)
