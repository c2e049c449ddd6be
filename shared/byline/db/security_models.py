"""Tables of projects, API keys, uploads and the audit's hash chain.

Why it exists: they belong to the security of the system and to nothing else; ``models.py`` has the rest and the
conventions. Written by ``byline.security`` and, for uploads, by the gateway.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, Float, ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from byline.db.models import NOW, Base


class ProjectRow(Base):
    """A project: what keys are bound to and what jobs belong to. A disabled project's keys open nothing."""

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    disabled_at: Mapped[datetime | None]
    #: Requests a second of all its keys together; NULL: the server's default.
    rate_per_second: Mapped[float | None] = mapped_column(Float(53))


class ApiKeyRow(Base):
    """One API key. Only the digest of its secret is kept: who reads this table cannot use a key of it."""

    __tablename__ = "api_keys"
    __table_args__ = (Index("ix_api_keys_project_id", "project_id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    #: NULL: an operator's key, which may act in every project.
    project_id: Mapped[str | None] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str]
    secret_sha256: Mapped[bytes]
    scopes: Mapped[list[str]]
    rate_per_second: Mapped[float | None] = mapped_column(Float(53))
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    created_by: Mapped[str]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class UploadRow(Base):
    """An image a project has uploaded: it may be asked about by its digest, and is forgotten when it is not."""

    __tablename__ = "uploads"

    project_id: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)


class AuditChainRow(Base):
    """The place of one audit event in the hash chain: ``hash`` covers the event and the hash before it."""

    __tablename__ = "audit_chain"

    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    event_id: Mapped[int] = mapped_column(BigInteger, ForeignKey("audit_events.id"), unique=True)
    #: Which signing key made it; empty for a plain sha256.
    key_id: Mapped[str]
    hash: Mapped[bytes]
    at: Mapped[datetime] = mapped_column(server_default=NOW)
