"""Clients' jobs that may be learnt from: which of them become labels, or samples of drift.

Why it exists: only a job whose client said so (``labelling_consent``) is ever looked at, and that rule must stand in
one place. A job is taken at most once for each purpose; the row that says so is written with what it led to.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Table, select, text
from sqlalchemy.dialects.postgresql import insert

from byline.db.curation_models import LiveIntakeRow

INTAKE: Table = LiveIntakeRow.metadata.tables["live_intake"]
#: Key of a job's payload under which the client's consent stands.
CONSENT = "may_learn"

_CONSENTED = """
    FROM jobs j WHERE j.model_id = :model AND (j.payload ->> 'may_learn') = 'true' AND j.state = 'SUCCEEDED'
        AND j.kind = 'attribution' AND j.image_sha256 IS NOT NULL
        AND j.end_time > now() - make_interval(days => :days)
"""
# The hash of the id decides, so that a job is sampled or not whoever looks, and again after a restart.
_SAMPLE = text(f"""
    INSERT INTO live_intake (job_id, purpose, model_id, prompt, image_sha256, release_id, state, at)
    SELECT j.id, 'drift', j.model_id, j.prompt, j.image_sha256, j.release_id, 'waiting', j.end_time {_CONSENTED}
        AND ('x' || substr(md5(j.id::text), 1, 8))::bit(32)::bigint < :share * 4294967296
    ON CONFLICT DO NOTHING
""")  # noqa: S608
_VERIFIED = text(f"""
    SELECT j.id, j.prompt, j.image_sha256, j.release_id, j.end_time,
        (SELECT r.result FROM job_results r WHERE r.job_id = j.id AND r.stage = 'verify') AS result {_CONSENTED}
        AND j.tier = 'VERIFIED'
        AND NOT EXISTS (SELECT 1 FROM live_intake i WHERE i.job_id = j.id AND i.purpose = 'live')
    ORDER BY j.end_time, j.id LIMIT :most
""")  # noqa: S608
_RECENT = text(f"""
    SELECT DISTINCT ON (j.prompt, j.image_sha256) j.id, j.prompt, j.image_sha256, j.release_id, j.end_time {_CONSENTED}
    ORDER BY j.prompt, j.image_sha256, j.end_time DESC LIMIT :most
""")  # noqa: S608


@dataclass(frozen=True)
class LiveQuery:
    """What a client asked. ``at``: when it was answered, by ``release_id``."""

    job_id: uuid.UUID
    prompt: str
    image_sha256: str
    release_id: str | None
    at: datetime


@dataclass(frozen=True)
class Verified:
    """A client's verification with what it found; ``result`` None if it was not verified after all."""

    query: LiveQuery
    result: Mapping[str, Any] | None


@dataclass(frozen=True, eq=False)
class VerifiedRanking:
    """A verified answer as a label (``byline.rankings.store.RankingLike``)."""

    item_ids: NDArray[np.int64]
    tau: NDArray[np.float32]
    standard_error: NDArray[np.float32]
    draws: int
    teacher_id: str
    candidate_set: str
    #: An answer does not keep them.
    tau_halves: NDArray[np.float32] | None = None
    samples: NDArray[np.int32] | None = None


def sample_lookups(connection: Connection, model_id: str, share: float, days: int = 1) -> int:
    """Set aside a ``share`` of the opted-in jobs of the last ``days`` for drift; returns how many are new."""
    return connection.execute(_SAMPLE, {"model": model_id, "share": share, "days": days}).rowcount


def verified_jobs(connection: Connection, model_id: str, most: int, days: int = 7) -> list[Verified]:
    """Opted-in verifications that were not looked at yet, oldest first."""
    rows = connection.execute(_VERIFIED, {"model": model_id, "most": most, "days": days})
    return [Verified(LiveQuery(row.id, row.prompt, row.image_sha256, row.release_id, row.end_time), row.result)
            for row in rows]


def recent_queries(connection: Connection, model_id: str, most: int, days: int = 7) -> list[LiveQuery]:
    """Different queries of opted-in jobs: possible labels like a corpus caption is."""
    rows = connection.execute(_RECENT, {"model": model_id, "most": most, "days": days})
    return [LiveQuery(row.id, row.prompt, row.image_sha256, row.release_id, row.end_time) for row in rows]


def waiting_samples(connection: Connection, model_id: str, most: int) -> list[LiveQuery]:
    """Samples of drift that no teacher was asked about yet, newest first: they tell of the window that alarms watch."""
    statement = (
        select(INTAKE)
        .where(INTAKE.c.model_id == model_id, INTAKE.c.state == "waiting")
        .order_by(INTAKE.c.at.desc(), INTAKE.c.job_id)
        .limit(most)
    )
    return [LiveQuery(row["job_id"], row["prompt"], row["image_sha256"], row["release_id"], row["at"])
            for row in connection.execute(statement).mappings()]


def intake_labelled(connection: Connection, model_id: str, query: LiveQuery, query_id: uuid.UUID | None, why: str
                    ) -> bool:
    """Record that a verification became the label ``query_id`` (None: it did not, ``why``). False if known already."""
    values = {
        "job_id": query.job_id, "purpose": "live", "model_id": model_id, "prompt": query.prompt,
        "image_sha256": query.image_sha256, "release_id": query.release_id, "at": query.at, "why": why,
        "state": "void" if query_id is None else "labelled", "query_id": query_id,
    }  # fmt: skip
    statement = insert(INTAKE).values(values).on_conflict_do_nothing().returning(INTAKE.c.job_id)
    return connection.execute(statement).scalar() is not None


def intake_asked(connection: Connection, job_id: uuid.UUID, query_id: uuid.UUID) -> None:
    """Record that the teacher was asked about a sample, in the transaction that made its ranking job."""
    connection.execute(
        INTAKE.update().where(INTAKE.c.job_id == job_id, INTAKE.c.purpose == "drift")
        .values(state="asked", query_id=query_id)
    )  # fmt: skip


def void_sample(connection: Connection, job_id: uuid.UUID, why: str) -> None:
    """Record that a sample will not be measured, and why."""
    connection.execute(
        INTAKE.update().where(INTAKE.c.job_id == job_id, INTAKE.c.purpose == "drift").values(state="void", why=why)
    )


def drop_stale_samples(connection: Connection, model_id: str, older_than: timedelta) -> int:
    """Give up samples that waited so long for the teacher that no window asks for them any more; returns how many."""
    statement = text(
        "UPDATE live_intake SET state = 'void', why = 'the teacher had no time for it' WHERE model_id = :model "
        "AND purpose = 'drift' AND state = 'waiting' AND at < now() - make_interval(secs => :seconds)"
    )
    return connection.execute(statement, {"model": model_id, "seconds": older_than.total_seconds()}).rowcount


def forget_void(connection: Connection, model_id: str, days: int = 8) -> int:
    """Drop what led to nothing once its job is too old to be looked at again: it would keep a client's picture."""
    statement = text(
        "DELETE FROM live_intake WHERE model_id = :model AND state = 'void' "
        "AND at < now() - make_interval(days => :days)"
    )
    return connection.execute(statement, {"model": model_id, "days": days}).rowcount


def ranking_of(result: Mapping[str, Any], gone: Sequence[int] | frozenset[int]) -> VerifiedRanking | None:
    """The label in a verified answer, without items that are ``gone``; None if fewer than two items are left."""
    lines = [one for one in (*result.get("influences", ()), *result.get("candidates", ()))
             if one.get("tau") is not None and int(one["item_id"]) not in gone]
    if len(lines) < 2 or not result.get("teacher_id"):
        return None
    errors = [np.nan if one.get("standard_error") is None else one["standard_error"] for one in lines]
    return VerifiedRanking(
        np.array([int(one["item_id"]) for one in lines], dtype=np.int64),
        np.array([one["tau"] for one in lines], dtype=np.float32), np.array(errors, dtype=np.float32),
        int(result.get("draws") or 0), str(result["teacher_id"]), f"retrieved-{len(lines)}",
    )  # fmt: skip
