"""The values of the job world: what a client asks, what a row says, what a worker holds.

Why it exists: everything outside the store works with these frozen values and never with a database row,
so nobody can change a job except through the store.
"""

from __future__ import annotations

import hashlib
import json
import struct
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from byline.jobs.states import TERMINAL, Kind, Stage, State, Tier, Verification


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job as asked for. The query is ``image_sha256`` (a stored blob) or a ready ``embedding``."""

    project_id: str
    request_id: str
    model_id: str
    prompt: str
    kind: Kind = Kind.ATTRIBUTION
    image_sha256: str | None = None
    #: The query's attribution embedding, float32, when the image itself stays with the client.
    embedding: tuple[float, ...] | None = None
    tier: Tier = Tier.RETRIEVED
    verification: Verification = Verification.REQUIRED
    top_k: int = 20
    candidates: int = 40
    #: Seconds from creation after which the job fails with DEADLINE_EXCEEDED if it has not ended.
    ttl_s: float = 3600.0
    payload: Mapping[str, Any] = field(default_factory=dict)
    max_attempts: int = 3
    #: W3C trace of the request that made the job; not part of what it asks for.
    traceparent: str | None = None
    #: Who asked, for the audit: an API key's id, or ``local``. Not part of what is asked for.
    principal: str = "local"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row of ``jobs`` as it was when it was read."""

    id: uuid.UUID
    project_id: str
    request_id: str
    fingerprint: str
    kind: Kind
    model_id: str
    prompt: str
    image_sha256: str | None
    embedding: tuple[float, ...] | None
    tier: Tier
    verification: Verification
    top_k: int
    candidates: int
    payload: Mapping[str, Any]
    state: State
    stage: Stage
    attempt: int
    max_attempts: int
    fence: int
    lease_owner: str | None
    lease_until: datetime | None
    next_attempt_at: datetime | None
    dispatched_at: datetime | None
    cancel_requested_at: datetime | None
    expire_time: datetime
    release_id: str | None
    progress_done: int
    progress_total: int
    #: ``BylineError.to_json()`` of what ended the job, or of its last failed attempt while it is retried.
    error: Mapping[str, Any] | None
    #: Rises with every change a watcher may see; equal revisions mean equal jobs.
    revision: int
    create_time: datetime
    start_time: datetime | None
    end_time: datetime | None
    update_time: datetime
    #: Where its trace goes on, whoever runs it and however often (``byline.tracing``).
    traceparent: str | None = None
    #: Who asked for it.
    principal: str = "local"

    @property
    def is_terminal(self) -> bool:
        """Whether the job has ended."""
        return self.state in TERMINAL


@dataclass(frozen=True)
class Claim:
    """A worker's right to work on one stage of one job until another claim raises the fence."""

    job: Job
    stage: Stage
    fence: int
    worker_id: str
    #: Seconds the stage had waited when it was claimed, by the database's clock.
    waited_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What one stage of a job found: ``result`` is the stage's JSON, ``release_id`` what it was found with."""

    stage: Stage
    release_id: str | None
    fence: int
    result: Mapping[str, Any]
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """One change of a job's state: when, from what to what, by whom and why."""

    at: datetime
    from_state: State | None
    to_state: State
    stage: Stage
    actor: str
    fence: int
    reason: str


def fingerprint(new: NewJob) -> str:
    """sha256 of everything a request asks for: the same id must mean the same request. Who asked, and under which
    trace, is no part of it: a repeated Create has a new trace."""
    contents = {
        "project_id": new.project_id,
        "kind": new.kind,
        "model_id": new.model_id,
        "prompt": new.prompt,
        "image_sha256": new.image_sha256,
        "embedding": None if new.embedding is None else pack_embedding(new.embedding).hex(),
        "tier": new.tier,
        "verification": new.verification,
        "top_k": new.top_k,
        "candidates": new.candidates,
        "ttl_s": float(new.ttl_s),
        "payload": dict(new.payload),
        "max_attempts": new.max_attempts,
    }
    canonical = json.dumps(contents, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def labelled_queries(payload: Mapping[str, Any]) -> list[uuid.UUID]:
    """The queries that a ranking job with this payload labels: ``query_ids``, or the one ``query_id`` of older jobs.

    What is not a UUID is passed over: to refuse a payload is the stage's business.
    """
    named = payload.get("query_ids", [payload["query_id"]] if "query_id" in payload else [])
    found: list[uuid.UUID] = []
    for text in named if isinstance(named, list) else []:
        with suppress(ValueError):
            found.append(uuid.UUID(str(text)))
    return list(dict.fromkeys(found))


def pack_embedding(embedding: tuple[float, ...]) -> bytes:
    """float32, little-endian."""
    return struct.pack(f"<{len(embedding)}f", *embedding)


def unpack_embedding(data: bytes) -> tuple[float, ...]:
    """The inverse of ``pack_embedding``."""
    return struct.unpack(f"<{len(data) // 4}f", data)
