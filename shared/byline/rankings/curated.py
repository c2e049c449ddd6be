"""What curation recorded about queries: why each was chosen, where its candidates came from, how its label measured.

Why it exists: the curation service writes these rows in the transactions that make queries and jobs, and the gateway
reads them; neither should know the other's statements. Functions of the caller's connection, pure SQL.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Table, func, select, text
from sqlalchemy.dialects.postgresql import insert

from byline.db.curation_models import LabelMeasureRow, LabelRepeatRow, QueryChoiceRow, ShortlistRow
from byline.db.models import ActiveReleaseRow
from byline.drift.windows import Measured
from byline.rankings.store import QUERIES, RANKINGS, REPEAT_PREFIX

CHOICES: Table = QueryChoiceRow.metadata.tables["query_choices"]
SHORTLISTS: Table = ShortlistRow.metadata.tables["shortlists"]
REPEATS: Table = LabelRepeatRow.metadata.tables["label_repeats"]
MEASURES: Table = LabelMeasureRow.metadata.tables["label_measures"]
_ACTIVE: Table = ActiveReleaseRow.metadata.tables["active_releases"]

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class StoredShortlist:
    """Ids of a ranking's candidates by where they came from; ``outside``: how many items were left out of both."""

    nearest: Ids
    by_head: Ids
    explored: Ids
    outside: int
    release_id: str | None


@dataclass(frozen=True)
class LabelCounts:
    """Labelled queries by split, source and purpose, and queries that wait for their label."""

    by_split: Mapping[str, int]
    by_source: Mapping[str, int]
    by_purpose: Mapping[str, int]
    by_teacher: Mapping[str, int]
    repeats: int


@dataclass(frozen=True)
class PruningRow:
    """One query's ``lost`` and ``missed`` (``byline.drift.measure``)."""

    lost: float
    missed: float


def active_release_id(connection: Connection, model_id: str) -> str | None:
    """The release that answers now, in the caller's transaction."""
    statement = select(_ACTIVE.c.release_id).where(_ACTIVE.c.model_id == model_id)
    found: str | None = connection.execute(statement).scalar()
    return found


def add_choice(
    connection: Connection, query_id: uuid.UUID, model_id: str, chosen_for: str, release_id: str | None
) -> None:
    """Record why a query was chosen; the first reason stays."""
    values = {"query_id": query_id, "model_id": model_id, "chosen_for": chosen_for, "release_id": release_id}
    connection.execute(insert(CHOICES).values(values).on_conflict_do_nothing())


def add_shortlist(connection: Connection, query_id: uuid.UUID, candidate_set: str, lists: StoredShortlist) -> None:
    """Record where the candidates of a ranking came from; asking again (its job ended in vain) replaces it."""
    values = {
        "nearest": _packed(lists.nearest), "by_head": _packed(lists.by_head), "explored": _packed(lists.explored),
        "outside": lists.outside, "release_id": lists.release_id,
    }  # fmt: skip
    statement = insert(SHORTLISTS).values(query_id=query_id, candidate_set=candidate_set, **values)
    connection.execute(
        statement.on_conflict_do_update(index_elements=["query_id", "candidate_set"], set_=values)
    )


def shortlist_of(connection: Connection, query_id: uuid.UUID, candidate_set: str) -> StoredShortlist | None:
    """Where the candidates came from; None for rankings from before that was recorded."""
    statement = select(SHORTLISTS).where(
        SHORTLISTS.c.query_id == query_id, SHORTLISTS.c.candidate_set == candidate_set
    )
    row = connection.execute(statement).mappings().first()
    if row is None:
        return None
    nearest, by_head, explored = (np.frombuffer(row[name], dtype="<i8") for name in ("nearest", "by_head", "explored"))
    return StoredShortlist(nearest, by_head, explored, row["outside"], row["release_id"])


@dataclass(frozen=True, eq=False)
class Repeatable:
    """A labelled query that was not asked for twice yet, with what it was ranked over."""

    query_id: uuid.UUID
    prompt: str
    item_ids: Ids


def labels_made(connection: Connection, model_id: str) -> tuple[int, int]:
    """How many of the queries that curation chose are labelled, and how many were asked for once more."""
    labelled = select(func.count()).select_from(CHOICES).where(
        CHOICES.c.model_id == model_id, CHOICES.c.query_id.in_(select(RANKINGS.c.query_id))
    )
    repeated = select(func.count()).select_from(REPEATS).where(REPEATS.c.model_id == model_id)
    return int(connection.execute(labelled).scalar_one()), int(connection.execute(repeated).scalar_one())


def repeatable(connection: Connection, model_id: str, family: str, most: int, draw: str) -> list[Repeatable]:
    """Up to ``most`` queries labelled by curation's own teacher, drawn uniformly: ``draw`` names the draw."""
    statement = text("""
        SELECT r.query_id, q.prompt, r.item_ids FROM rankings r JOIN queries q ON q.id = r.query_id
            JOIN query_choices c ON c.query_id = r.query_id
        WHERE r.model_id = :model AND split_part(r.teacher_id, '/', 1) = :family AND r.candidate_set NOT LIKE 'repeat-%'
            AND NOT EXISTS (SELECT 1 FROM label_repeats p WHERE p.query_id = r.query_id)
        ORDER BY md5(r.query_id::text || :draw) LIMIT :most
    """)
    rows = connection.execute(statement, {"model": model_id, "family": family, "most": most, "draw": draw})
    return [Repeatable(row.query_id, row.prompt, np.frombuffer(row.item_ids, dtype="<i8")) for row in rows]


def add_repeat(connection: Connection, query_id: uuid.UUID, model_id: str, candidate_set: str, job_id: uuid.UUID
               ) -> None:
    """Record that a query is asked for once more, in the transaction that makes the job."""
    values = {"query_id": query_id, "model_id": model_id, "candidate_set": candidate_set, "job_id": job_id}
    connection.execute(insert(REPEATS).values(values).on_conflict_do_nothing())


def rankings_made(connection: Connection, model_id: str) -> int:
    """How many rankings of the model there are, whoever made them: what ``BYLINE_CURATION_MAX_RANKINGS`` limits."""
    statement = select(func.count()).select_from(RANKINGS).where(RANKINGS.c.model_id == model_id)
    return int(connection.execute(statement).scalar_one())


def choices_made(connection: Connection, model_id: str) -> int:
    """How many queries were chosen so far: the counter behind every seeded draw."""
    statement = select(func.count()).select_from(CHOICES).where(CHOICES.c.model_id == model_id)
    return int(connection.execute(statement).scalar_one())


def asked_prompts(connection: Connection, model_id: str, most: int) -> tuple[tuple[str, ...], dict[str, float]]:
    """Prompts of the latest ``most`` queries, labelled or asked for, and the disagreement that was measured on them."""
    prompts = select(QUERIES.c.prompt, func.max(QUERIES.c.created_at).label("at")).where(
        QUERIES.c.model_id == model_id
    ).group_by(QUERIES.c.prompt).order_by(text("at DESC"), QUERIES.c.prompt).limit(most)
    measured = (
        select(QUERIES.c.prompt, func.avg(1.0 - MEASURES.c.overlap))
        .join(QUERIES, QUERIES.c.id == MEASURES.c.query_id)
        .where(MEASURES.c.model_id == model_id, MEASURES.c.kind == "student", MEASURES.c.overlap.is_not(None))
        .group_by(QUERIES.c.prompt)
    )
    found = tuple(row.prompt for row in connection.execute(prompts))
    return found, {prompt: float(value) for prompt, value in connection.execute(measured)}


def stored_places(connection: Connection, model_id: str) -> dict[str, tuple[int, str]]:
    """Group and split of every stored query's prompt."""
    statement = select(QUERIES.c.prompt, QUERIES.c.near_duplicate_group, QUERIES.c.split).where(
        QUERIES.c.model_id == model_id
    ).distinct()
    return {prompt: (int(group), split) for prompt, group, split in connection.execute(statement)}


def measured_rows(connection: Connection, model_id: str, purposes: Sequence[str], since: datetime) -> list[Measured]:
    """What was measured of the student on queries of these purposes since then, oldest first."""
    statement = select(MEASURES).where(
        MEASURES.c.model_id == model_id, MEASURES.c.kind == "student", MEASURES.c.purpose.in_(list(purposes)),
        MEASURES.c.at >= since,
    ).order_by(MEASURES.c.at, MEASURES.c.ranking_id)  # fmt: skip
    return [
        Measured(row["at"], row["cluster"], row["release_id"], _number(row["overlap"]), _number(row["spearman"]),
                 _number(row["predicted"]) - _number(row["observed"]))
        for row in connection.execute(statement).mappings()
    ]  # fmt: skip


def reliability_rows(connection: Connection, model_id: str) -> list[tuple[float, float]]:
    """(overlap, spearman) of every repeated label with the one it repeats."""
    statement = select(MEASURES.c.overlap, MEASURES.c.spearman).where(
        MEASURES.c.model_id == model_id, MEASURES.c.kind == "repeat"
    )
    return [(_number(overlap), _number(rho)) for overlap, rho in connection.execute(statement)]


def pruning_rows(connection: Connection, model_id: str, since: datetime) -> list[PruningRow]:
    """What the shortlists of uniformly chosen queries missed: only these stand for all possible queries."""
    statement = select(MEASURES.c.lost, MEASURES.c.missed).where(
        MEASURES.c.model_id == model_id, MEASURES.c.kind == "student", MEASURES.c.lost.is_not(None),
        MEASURES.c.purpose.in_(["uniform", "drift"]), MEASURES.c.at >= since,
    )  # fmt: skip
    return [PruningRow(float(lost), float(missed)) for lost, missed in connection.execute(statement)]


def label_counts(connection: Connection, model_id: str) -> LabelCounts:
    """How many labelled queries there are, several ways."""
    labelled = (
        select(QUERIES.c.id, QUERIES.c.split, QUERIES.c.source)
        .where(QUERIES.c.model_id == model_id, QUERIES.c.id.in_(select(RANKINGS.c.query_id)))
        .subquery()
    )
    purpose = func.coalesce(CHOICES.c.chosen_for, "before")

    def counts(column: object, joined: bool = False) -> dict[str, int]:
        source = labelled.outerjoin(CHOICES, CHOICES.c.query_id == labelled.c.id) if joined else labelled
        statement = select(column, func.count()).select_from(source).group_by(column)  # type: ignore[call-overload]
        return {str(name): int(count) for name, count in connection.execute(statement)}

    teachers = select(RANKINGS.c.teacher_id, func.count()).where(
        RANKINGS.c.model_id == model_id, RANKINGS.c.candidate_set.not_like(REPEAT_PREFIX + "%")
    ).group_by(RANKINGS.c.teacher_id)
    repeats = select(func.count()).select_from(MEASURES).where(
        MEASURES.c.model_id == model_id, MEASURES.c.kind == "repeat"
    )
    return LabelCounts(
        counts(labelled.c.split), counts(labelled.c.source), counts(purpose, joined=True),
        {str(teacher): int(count) for teacher, count in connection.execute(teachers)},
        int(connection.execute(repeats).scalar_one()),
    )  # fmt: skip


def _packed(ids: Ids) -> bytes:
    return np.asarray(ids, dtype="<i8").tobytes()


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
