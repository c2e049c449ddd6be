"""Every table of Byline, as SQLAlchemy models.

Why it exists: the schema is a contract between services, so it stands in one file that can be read from top
to bottom. The migrations create it (``tests/integration/jobs/test_migrations.py`` holds both equal); triggers
that notify and guard the jobs table live in the first migration. Times are UTC and come from the database's
clock only. Who writes a table is said above it.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, UUID
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NOW = text("now()")
LIVE = "state IN ('QUEUED', 'RUNNING', 'CANCELLING')"


class Base(DeclarativeBase):
    """Declares the naming of constraints and how Python types map to columns."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {
        str: Text,
        int: Integer,
        bytes: LargeBinary,
        bool: Boolean,
        datetime: DateTime(timezone=True),
        uuid.UUID: UUID(as_uuid=True),
        dict[str, Any]: JSONB,
        list[str]: JSONB,
    }


def one_of(column: str, *values: str) -> CheckConstraint:
    """A check that ``column`` holds one of ``values``."""
    allowed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({allowed})", name=column)


# --- corpora and models (written by byline.catalog) --------------------------------------------------------


class CorpusRow(Base):
    """A set of training images. ``sequence`` counts the transactions that added items."""

    __tablename__ = "corpora"

    id: Mapped[str] = mapped_column(primary_key=True)
    sequence: Mapped[int] = mapped_column(BigInteger, server_default="0")
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)


class ModelRow(Base):
    """A text-to-image model whose outputs are attributed."""

    __tablename__ = "models"

    id: Mapped[str] = mapped_column(primary_key=True)
    corpus_id: Mapped[str] = mapped_column(ForeignKey("corpora.id"))
    directory: Mapped[str]
    revision: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)


class ItemRow(Base):
    """One training image. ``withdrawn_at`` set means: in no answer from that moment on. ``look`` recognises copies."""

    __tablename__ = "items"
    __table_args__ = (
        Index("ix_items_corpus_id_item_id", "corpus_id", "item_id"),
        Index("ix_items_corpus_id_added_sequence", "corpus_id", "added_sequence"),
        Index("ix_items_withdrawn", "corpus_id", postgresql_where=text("withdrawn_at IS NOT NULL")),
    )

    item_id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    corpus_id: Mapped[str] = mapped_column(ForeignKey("corpora.id"))
    caption: Mapped[str]
    keywords: Mapped[list[str]] = mapped_column(server_default=text("'[]'::jsonb"))
    creator: Mapped[str] = mapped_column(server_default="")
    licence: Mapped[str] = mapped_column(server_default="")
    source: Mapped[str] = mapped_column(server_default="")
    source_path: Mapped[str] = mapped_column(server_default="")
    image_sha256: Mapped[str]
    near_duplicate_group: Mapped[int] = mapped_column(BigInteger)
    added_sequence: Mapped[int] = mapped_column(BigInteger, server_default="0")
    look_hash: Mapped[int | None] = mapped_column(BigInteger)
    look: Mapped[bytes | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    withdrawn_at: Mapped[datetime | None]


# --- jobs (written by byline.jobs.store only) --------------------------------------------------------------


class JobRow(Base):
    """One attribution request (kind ``attribution``) or one ranking for curation (kind ``ranking``).

    The row is also the outbox: a QUEUED job with ``dispatched_at`` NULL or old waits for its doorbell.
    ``fence`` counts claims; every write of a worker carries the fence of its claim.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("project_id", "request_id"),
        one_of("kind", "attribution", "ranking"),
        one_of("tier", "RETRIEVED", "ESTIMATED", "VERIFIED"),
        one_of("verification", "REQUIRED", "BEST_EFFORT"),
        one_of("state", "QUEUED", "RUNNING", "CANCELLING", "SUCCEEDED", "FAILED", "CANCELLED"),
        one_of("stage", "lookup", "estimate", "verify", "rank"),
        Index("ix_jobs_listing", "project_id", "create_time", "id"),
        Index("ix_jobs_queued", "stage", "project_id", "create_time", postgresql_where=text("state = 'QUEUED'")),
        Index(
            "ix_jobs_rung",
            "stage",
            "dispatched_at",
            postgresql_where=text("state = 'QUEUED' AND dispatched_at IS NOT NULL"),
        ),
        Index("ix_jobs_leased", "lease_until", postgresql_where=text("state IN ('RUNNING', 'CANCELLING')")),
        Index("ix_jobs_expiring", "expire_time", postgresql_where=text(LIVE)),
        Index("ix_jobs_live_verified", "stage", postgresql_where=text(f"tier = 'VERIFIED' AND {LIVE}")),
        Index("ix_jobs_failed", "end_time", postgresql_where=text("state = 'FAILED'")),
        Index("ix_jobs_image_sha256", "image_sha256", postgresql_where=text("image_sha256 IS NOT NULL")),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    project_id: Mapped[str]
    request_id: Mapped[str]
    fingerprint: Mapped[str]
    kind: Mapped[str]
    model_id: Mapped[str]
    prompt: Mapped[str]
    image_sha256: Mapped[str | None]
    embedding: Mapped[bytes | None]
    tier: Mapped[str]
    verification: Mapped[str]
    top_k: Mapped[int]
    candidates: Mapped[int]
    payload: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'::jsonb"))
    state: Mapped[str]
    stage: Mapped[str]
    attempt: Mapped[int] = mapped_column(server_default="0")
    max_attempts: Mapped[int]
    fence: Mapped[int] = mapped_column(BigInteger, server_default="0")
    lease_owner: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    next_attempt_at: Mapped[datetime | None]
    dispatched_at: Mapped[datetime | None]
    cancel_requested_at: Mapped[datetime | None]
    expire_time: Mapped[datetime]
    release_id: Mapped[str | None]
    progress_done: Mapped[int] = mapped_column(server_default="0")
    progress_total: Mapped[int] = mapped_column(server_default="0")
    error: Mapped[dict[str, Any] | None]
    traceparent: Mapped[str | None]
    principal: Mapped[str] = mapped_column(server_default="local")
    revision: Mapped[int] = mapped_column(BigInteger, server_default="1")
    create_time: Mapped[datetime] = mapped_column(server_default=NOW)
    start_time: Mapped[datetime | None]
    end_time: Mapped[datetime | None]
    update_time: Mapped[datetime] = mapped_column(server_default=NOW)


class JobResultRow(Base):
    """What one stage of a job found. The primary key makes a stage take effect once."""

    __tablename__ = "job_results"

    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    stage: Mapped[str] = mapped_column(primary_key=True)
    release_id: Mapped[str | None]
    fence: Mapped[int] = mapped_column(BigInteger)
    result: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)


class JobEventRow(Base):
    """One change of state: the audit trail, the timeline people see, and the oracle of the chaos tests."""

    __tablename__ = "job_events"
    __table_args__ = (Index("ix_job_events_job_id_id", "job_id", "id"),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    at: Mapped[datetime] = mapped_column(server_default=NOW)
    from_state: Mapped[str | None]
    to_state: Mapped[str]
    stage: Mapped[str]
    actor: Mapped[str]
    fence: Mapped[int] = mapped_column(BigInteger)
    reason: Mapped[str]


class JobQueryRow(Base):
    """A query that a ranking job labels (it may label several), and the teacher that is to do it.

    Written with the job from its payload, so that curation can ask which queries are taken care of without
    reading payloads. No foreign key to ``queries``: the job tables know nothing of labels.
    """

    __tablename__ = "job_queries"
    __table_args__ = (Index("ix_job_queries_query_id", "query_id"),)

    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    query_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    teacher: Mapped[str]


class StageControlRow(Base):
    """An operator's pause of a stage; no row means running."""

    __tablename__ = "stage_controls"

    stage: Mapped[str] = mapped_column(primary_key=True)
    paused: Mapped[bool] = mapped_column(server_default=text("false"))


# --- labels (written by byline.rankings) -------------------------------------------------------------------


class QueryRow(Base):
    """A generated image with its prompt, labelled or to be labelled by a teacher."""

    __tablename__ = "queries"
    __table_args__ = (
        UniqueConstraint("model_id", "prompt", "seed"),
        one_of("split", "train", "validation", "test"),
        one_of("source", "corpus", "file", "live"),
        Index("ix_queries_model_id_split", "model_id", "split"),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    model_id: Mapped[str]
    prompt: Mapped[str]
    seed: Mapped[int] = mapped_column(BigInteger)
    split: Mapped[str]
    near_duplicate_group: Mapped[int] = mapped_column(BigInteger)
    image_sha256: Mapped[str]
    source: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)


class RankingRow(Base):
    """What a teacher says of one query, kept for ever.

    Arrays are little-endian: ids int64, ``samples`` int32 (NULL in rankings from before it was kept), the rest float32.
    """

    __tablename__ = "rankings"
    __table_args__ = (
        UniqueConstraint("query_id", "teacher_id", "candidate_set"),
        Index("ix_rankings_model_id_teacher_id", "model_id", "teacher_id"),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    query_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("queries.id"))
    model_id: Mapped[str]
    teacher_id: Mapped[str]
    candidate_set: Mapped[str]
    n: Mapped[int]
    item_ids: Mapped[bytes]
    tau: Mapped[bytes]
    standard_error: Mapped[bytes]
    tau_halves: Mapped[bytes | None]
    samples: Mapped[bytes | None]
    draws: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    job_id: Mapped[uuid.UUID | None]


# --- releases (written by byline.releases.registry) --------------------------------------------------------


class ReleaseRow(Base):
    """One immutable release directory and how it fared at the gate."""

    __tablename__ = "releases"
    __table_args__ = (
        one_of("state", "BUILT", "VALIDATED", "ACTIVE", "RETIRED", "REJECTED"),
        Index("ix_releases_model_id_created_at", "model_id", "created_at"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str]
    state: Mapped[str]
    directory: Mapped[str]
    manifest: Mapped[dict[str, Any]]
    metrics: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'::jsonb"))
    parent: Mapped[str | None]
    reason: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    #: Its files were removed (``byline.releases.garbage``); the row stays, it explains old answers.
    collected_at: Mapped[datetime | None]


class ActiveReleaseRow(Base):
    """The release a model answers from; changed by compare-and-set on ``epoch``."""

    __tablename__ = "active_releases"

    model_id: Mapped[str] = mapped_column(primary_key=True)
    release_id: Mapped[str] = mapped_column(ForeignKey("releases.id"))
    previous_release_id: Mapped[str | None] = mapped_column(ForeignKey("releases.id"))
    epoch: Mapped[int] = mapped_column(BigInteger, server_default="1")
    updated_at: Mapped[datetime] = mapped_column(server_default=NOW)


# --- operations (written by the services) ------------------------------------------------------------------


class WorkerReportRow(Base):
    """What a worker process last said of itself: the fleet view behind ``byline status``."""

    __tablename__ = "worker_reports"

    worker_id: Mapped[str] = mapped_column(primary_key=True)
    service: Mapped[str]
    queue: Mapped[str]
    release_id: Mapped[str | None]
    loaded_at: Mapped[datetime | None]
    error: Mapped[str | None]
    pid: Mapped[int]
    started_at: Mapped[datetime] = mapped_column(server_default=NOW)
    last_seen: Mapped[datetime] = mapped_column(server_default=NOW)


class AuditEventRow(Base):
    """Who asked for what, and what was decided. Never a prompt or an image."""

    __tablename__ = "audit_events"
    __table_args__ = (Index("ix_audit_events_project_id_at", "project_id", "at"),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    at: Mapped[datetime] = mapped_column(server_default=NOW)
    principal: Mapped[str]
    project_id: Mapped[str | None]
    action: Mapped[str]
    resource: Mapped[str]
    request_id: Mapped[str | None]
    decision: Mapped[str]
    detail: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'::jsonb"))
