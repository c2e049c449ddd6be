"""Projects, keys, uploads and the audit's hash chain.

Why it exists: who may do what is data, and what was done must not be rewritable. Triggers record every client's job
and every answer in the audit, so no path can forget to, and refuse to change or delete what stands in it.

Revision ID: 0010
Revises: 0009
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_TIME = sa.DateTime(timezone=True)
_NOW = sa.text("now()")
_GUARDED = ("audit_events", "audit_chain")

_FUNCTIONS = """
CREATE FUNCTION byline_audit_refuses() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
END $$;

CREATE FUNCTION byline_audit_job() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO audit_events (principal, project_id, action, resource, request_id, decision, detail)
    VALUES (NEW.principal, NEW.project_id, 'CreateAttributionJob', 'attributionJobs/' || NEW.id, NEW.request_id,
        'ALLOWED', jsonb_build_object('model', NEW.model_id, 'tier', NEW.tier, 'fingerprint', NEW.fingerprint));
    RETURN NULL;
END $$;

CREATE FUNCTION byline_audit_answer() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    job record;
BEGIN
    SELECT project_id, kind, lease_owner INTO job FROM jobs WHERE id = NEW.job_id;
    IF job.kind = 'attribution' THEN
        INSERT INTO audit_events (principal, project_id, action, resource, decision, detail)
        VALUES ('worker', job.project_id, 'AnswerAttributionJob', 'attributionJobs/' || NEW.job_id, 'ALLOWED',
            jsonb_build_object('stage', NEW.stage, 'release', NEW.release_id, 'worker', job.lease_owner));
    END IF;
    RETURN NULL;
END $$;
"""

_TRIGGERS = """
CREATE TRIGGER audit_job AFTER INSERT ON jobs
    FOR EACH ROW WHEN (NEW.kind = 'attribution') EXECUTE FUNCTION byline_audit_job();
CREATE TRIGGER audit_answer AFTER INSERT ON job_results
    FOR EACH ROW EXECUTE FUNCTION byline_audit_answer();
"""


def upgrade() -> None:
    op.create_table(
        "projects",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("created_at", _TIME, server_default=_NOW, nullable=False),
        sa.Column("disabled_at", _TIME),
        sa.Column("rate_per_second", sa.Float(53)),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_projects")),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text()),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("secret_sha256", sa.LargeBinary(), nullable=False),
        sa.Column("scopes", postgresql.JSONB(), nullable=False),
        sa.Column("rate_per_second", sa.Float(53)),
        sa.Column("created_at", _TIME, server_default=_NOW, nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("expires_at", _TIME),
        sa.Column("revoked_at", _TIME),
        sa.Column("last_used_at", _TIME),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_api_keys_project_id_projects")),
    )
    op.create_index("ix_api_keys_project_id", "api_keys", ["project_id"])
    op.create_table(
        "uploads",
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("created_at", _TIME, server_default=_NOW, nullable=False),
        sa.PrimaryKeyConstraint("project_id", "sha256", name=op.f("pk_uploads")),
    )
    op.create_table(
        "audit_chain",
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("event_id", sa.BigInteger(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.Column("at", _TIME, server_default=_NOW, nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_audit_chain")),
        sa.ForeignKeyConstraint(["event_id"], ["audit_events.id"], name=op.f("fk_audit_chain_event_id_audit_events")),
        sa.UniqueConstraint("event_id", name=op.f("uq_audit_chain_event_id")),
    )
    op.add_column("jobs", sa.Column("principal", sa.Text(), server_default=sa.text("'local'"), nullable=False))
    op.create_index(
        "ix_jobs_image_sha256", "jobs", ["image_sha256"], postgresql_where=sa.text("image_sha256 IS NOT NULL")
    )
    op.execute(_FUNCTIONS)
    op.execute(_TRIGGERS)
    for table in _GUARDED:
        op.execute(
            f"CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}"
            " FOR EACH STATEMENT EXECUTE FUNCTION byline_audit_refuses()"
        )


def downgrade() -> None:
    op.execute("DROP TRIGGER audit_answer ON job_results")
    op.execute("DROP TRIGGER audit_job ON jobs")
    for table in _GUARDED:
        op.execute(f"DROP TRIGGER append_only ON {table}")
    for function in ("byline_audit_answer", "byline_audit_job", "byline_audit_refuses"):
        op.execute(f"DROP FUNCTION {function}()")
    op.drop_index("ix_jobs_image_sha256", "jobs")
    op.drop_column("jobs", "principal")
    for table in ("audit_chain", "uploads", "api_keys", "projects"):
        op.drop_table(table)
