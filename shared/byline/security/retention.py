"""Forgetting: jobs with their answers, prompts and query images, after a time or when asked to.

Why it exists: what a client sends is the client's. A job that is deleted takes its results, its events and its prompt
with it; its image goes too unless another job, an upload, a corpus or a label still needs the same bytes. What stays is
the audit, which never held any of it.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from sqlalchemy import Connection, Engine, text

from byline.catalog.blobs import BlobStore
from byline.db.session import transaction
from byline.errors import JobNotFound
from byline.security.errors import JobNotDeletable

#: An image that was stored or asked about so lately is left for the next sweep: its job may not have committed yet
#: (a call takes ten seconds at most).
YOUNG_S = 60.0
_BATCH = 500
_LOCK = 0x666F72676574  # "forget" in ASCII: one sweeper at a time

_FIND = text("SELECT project_id, state, image_sha256 FROM jobs WHERE id = :id AND kind = 'attribution' FOR UPDATE")
_DELETE = text("DELETE FROM jobs WHERE id = :id")
_EXPIRED_JOBS = text("""
DELETE FROM jobs WHERE id IN (
    SELECT id FROM jobs WHERE kind = 'attribution' AND end_time < now() - make_interval(secs => :seconds)
    LIMIT :most FOR UPDATE SKIP LOCKED
) RETURNING id, image_sha256
""")
_EXPIRED_UPLOADS = text(
    "DELETE FROM uploads WHERE created_at < now() - make_interval(secs => :seconds) RETURNING sha256"
)
# An image that could not be removed yet is an upload of nobody.
_ORPHANS = text("DELETE FROM uploads WHERE project_id = '' RETURNING sha256")
_ORPHAN = text("INSERT INTO uploads (project_id, sha256) VALUES ('', :sha256) ON CONFLICT DO NOTHING")
_CONSENTED = text("DELETE FROM live_intake WHERE job_id = :id")
_NEEDED = text("""
SELECT EXISTS (SELECT 1 FROM jobs WHERE image_sha256 = :sha256)
    OR EXISTS (SELECT 1 FROM uploads WHERE sha256 = :sha256 AND project_id <> '')
    OR EXISTS (SELECT 1 FROM live_intake WHERE image_sha256 = :sha256)
    OR EXISTS (SELECT 1 FROM items WHERE image_sha256 = :sha256)
    OR EXISTS (SELECT 1 FROM queries WHERE image_sha256 = :sha256)
""")


class Retention:
    """Deletes jobs. ``days`` 0: only when asked to. Methods may raise DatabaseUnavailable."""

    def __init__(self, engine: Engine, blobs: BlobStore, days: float, young_s: float = YOUNG_S) -> None:
        self._engine = engine
        self._blobs = blobs
        self._young_s = young_s
        self._seconds = days * 86_400.0

    def delete_job(self, project_id: str, job_id: uuid.UUID) -> None:
        """Delete a client's job that has ended. JobNotFound (also another project's), JobNotDeletable."""
        with transaction(self._engine) as connection:
            row = connection.execute(_FIND, {"id": job_id}).one_or_none()
            if row is None or row.project_id != project_id:
                raise JobNotFound(f"project {project_id} has no job {job_id}", job=job_id)
            if row.state not in ("SUCCEEDED", "FAILED", "CANCELLED"):
                raise JobNotDeletable(f"job {job_id} has not ended: cancel it first", job=job_id, state=row.state)
            connection.execute(_DELETE, {"id": job_id})
            connection.execute(_CONSENTED, {"id": job_id})
            if row.image_sha256 is not None:
                connection.execute(
                    text("DELETE FROM uploads WHERE project_id = :project AND sha256 = :sha256 AND NOT EXISTS"
                         " (SELECT 1 FROM jobs WHERE project_id = :project AND image_sha256 = :sha256)"),
                    {"project": project_id, "sha256": row.image_sha256},
                )  # fmt: skip
        if row.image_sha256 is not None:
            self._forget([row.image_sha256])

    def sweep(self) -> int:
        """Delete what has ended long enough ago, 500 jobs at most; how many. 0 also while another process sweeps."""
        values = {"seconds": self._seconds, "most": _BATCH}
        images: set[str] = set()
        with transaction(self._engine) as connection:
            if not connection.execute(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _LOCK}).scalar_one():
                return 0
            images |= set(connection.execute(_ORPHANS).scalars())
            gone = connection.execute(_EXPIRED_JOBS, values).all() if self._seconds else []
            for job_id, sha256 in gone:
                connection.execute(_CONSENTED, {"id": job_id})
                if sha256 is not None:
                    images.add(sha256)
            if self._seconds:
                images |= set(connection.execute(_EXPIRED_UPLOADS, {"seconds": self._seconds}).scalars())
        self._forget(images)
        return len(gone)

    def _forget(self, images: Iterable[str]) -> None:
        for sha256 in sorted(images):
            with transaction(self._engine) as connection:
                needed = is_needed(connection, sha256)
                if not needed and not self._blobs.remove_unused(sha256, self._young_s):
                    connection.execute(_ORPHAN, {"sha256": sha256})


def is_needed(connection: Connection, sha256: str) -> bool:
    """Whether any row still leads to these bytes."""
    return bool(connection.execute(_NEEDED, {"sha256": sha256}).scalar_one())
