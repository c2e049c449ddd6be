"""Tables of curation and drift: what was chosen and why, how labels were measured, and what an operator allows.

Why it exists: beside ``models``, so that each stays readable. Written by the curation service through
``byline.rankings`` and ``byline.drift``; the controls by the gateway.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Double, ForeignKey, Identity, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from byline.db.models import NOW, Base, JobEventRow, JobRow, one_of

#: What a query was chosen for; ``repeat`` labels one again, ``live`` and ``drift`` come from clients that opted in.
PURPOSES = ("uniform", "far", "disagreement", "live", "drift")


class CurationControlRow(Base):
    """What an operator allows curation of a model to do; NULL means the default, no row means all defaults."""

    __tablename__ = "curation_controls"

    model_id: Mapped[str] = mapped_column(primary_key=True)
    paused: Mapped[bool] = mapped_column(server_default=text("false"))
    queries_per_hour: Mapped[float | None] = mapped_column(Double)
    gpu_share: Mapped[float | None] = mapped_column(Double)
    uniform_share: Mapped[float | None] = mapped_column(Double)
    repeat_share: Mapped[float | None] = mapped_column(Double)
    drift_share: Mapped[float | None] = mapped_column(Double)
    reason: Mapped[str] = mapped_column(server_default="")
    updated_at: Mapped[datetime] = mapped_column(server_default=NOW)


class QueryChoiceRow(Base):
    """Why curation chose a query. ``chance``: not written any more, since all uniform draws have the same."""

    __tablename__ = "query_choices"
    __table_args__ = (one_of("chosen_for", *PURPOSES), Index("ix_query_choices_model_id_at", "model_id", "at"))

    query_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("queries.id", ondelete="CASCADE"), primary_key=True)
    model_id: Mapped[str]
    chosen_for: Mapped[str]
    chance: Mapped[float | None] = mapped_column(Double)
    release_id: Mapped[str | None]
    at: Mapped[datetime] = mapped_column(server_default=NOW)


class ShortlistRow(Base):
    """Where the candidates of a ranking came from: item ids int64 little-endian, ``outside`` those left out of both.

    ``explored`` is a uniform sample of the ``outside`` items that neither list holds.
    """

    __tablename__ = "shortlists"

    query_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("queries.id", ondelete="CASCADE"), primary_key=True)
    candidate_set: Mapped[str] = mapped_column(primary_key=True)
    nearest: Mapped[bytes]
    by_head: Mapped[bytes]
    explored: Mapped[bytes]
    outside: Mapped[int]
    release_id: Mapped[str | None]


class LabelRepeatRow(Base):
    """A query that was asked for once more under other noise: at most once each."""

    __tablename__ = "label_repeats"

    query_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("queries.id", ondelete="CASCADE"), primary_key=True)
    model_id: Mapped[str]
    candidate_set: Mapped[str]
    job_id: Mapped[uuid.UUID]
    at: Mapped[datetime] = mapped_column(server_default=NOW)


class LiveIntakeRow(Base):
    """A client's job that opted in and was taken as a label, or sampled for drift. No foreign key: jobs expire."""

    __tablename__ = "live_intake"
    __table_args__ = (
        one_of("purpose", "live", "drift"),
        one_of("state", "waiting", "asked", "labelled", "void"),
        Index("ix_live_intake_waiting", "model_id", "at", postgresql_where=text("state = 'waiting'")),
    )

    job_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    purpose: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str]
    prompt: Mapped[str]
    image_sha256: Mapped[str]
    release_id: Mapped[str | None]
    state: Mapped[str]
    why: Mapped[str] = mapped_column(server_default="")
    query_id: Mapped[uuid.UUID | None]
    at: Mapped[datetime]


class LabelMeasureRow(Base):
    """What a new ranking says of the student that answered before it (``student``) or of the ranking that it repeats.

    ``missed``: estimate of how many items outside both shortlists beat the last of the top inside; ``lost``: that by
    the size of the top. ``predicted`` and ``observed``: mean probability of the student's candidates of
    being in the top, and how many are. ``at`` is when the query was asked or chosen.
    """

    __tablename__ = "label_measures"
    __table_args__ = (
        one_of("kind", "student", "repeat"),
        Index("ix_label_measures_model_id_kind_at", "model_id", "kind", "at"),
    )

    ranking_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("rankings.id", ondelete="CASCADE"), primary_key=True)
    model_id: Mapped[str]
    query_id: Mapped[uuid.UUID]
    kind: Mapped[str]
    purpose: Mapped[str]
    release_id: Mapped[str | None]
    cluster: Mapped[int | None]
    n: Mapped[int]
    k: Mapped[int]
    overlap: Mapped[float | None] = mapped_column(Double)
    spearman: Mapped[float | None] = mapped_column(Double)
    predicted: Mapped[float | None] = mapped_column(Double)
    observed: Mapped[float | None] = mapped_column(Double)
    lost: Mapped[float | None] = mapped_column(Double)
    missed: Mapped[float | None] = mapped_column(Double)
    at: Mapped[datetime]
    measured_at: Mapped[datetime] = mapped_column(server_default=NOW)


class PromptClusterRow(Base):
    """A region of prompts that drift is told apart by. Fitted once, so that windows stay comparable."""

    __tablename__ = "prompt_clusters"

    model_id: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    example: Mapped[str]
    centre: Mapped[bytes]
    encoder: Mapped[str]
    at: Mapped[datetime] = mapped_column(server_default=NOW)


class DriftAlarmRow(Base):
    """Agreement fell. Open until a refresh or an operator closes it; at most one is open for a model."""

    __tablename__ = "drift_alarms"
    __table_args__ = (
        Index("uq_drift_alarms_open", "model_id", unique=True, postgresql_where=text("closed_at IS NULL")),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    model_id: Mapped[str]
    raised_at: Mapped[datetime] = mapped_column(server_default=NOW)
    reason: Mapped[str]
    detail: Mapped[dict[str, Any]]
    closed_at: Mapped[datetime | None]
    closed_by: Mapped[str | None]


#: On tables of ``models``: clients' jobs that may be learnt from, and how long workers were busy with rankings.
MAY_LEARN = Index(
    "ix_jobs_may_learn", JobRow.model_id, JobRow.end_time,
    postgresql_where=text("(payload ->> 'may_learn') = 'true' AND state = 'SUCCEEDED'"),
)
RANK_EVENTS = Index("ix_job_events_rank", JobEventRow.at, postgresql_where=text("stage = 'rank'"))
