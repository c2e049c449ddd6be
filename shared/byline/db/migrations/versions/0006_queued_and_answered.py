"""Two more announcements: work that waits, and first answers.

Why it exists: a lookup takes milliseconds, so nobody on its path should read rows to find out that nothing has happened
yet. ``byline_queued`` (payload: the stage; then ``again`` for a job that was tried before, or ``taken`` when a
job of a slow stage stops waiting, which makes room for another doorbell) is for those who give or do work;
``byline_answered`` (payload: the job's id) says that the lookup is over, whatever came of it.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_NEW = """
CREATE OR REPLACE FUNCTION byline_job_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('byline_jobs', NEW.id::text);
    IF NEW.state = 'QUEUED' AND (TG_OP = 'INSERT' OR OLD.state <> 'QUEUED') THEN
        PERFORM pg_notify('byline_queued', NEW.stage || CASE WHEN NEW.attempt > 0 THEN ' again' ELSE '' END);
    END IF;
    IF TG_OP = 'UPDATE' AND OLD.state = 'QUEUED' AND NEW.state <> 'QUEUED' AND NEW.stage <> 'lookup' THEN
        PERFORM pg_notify('byline_queued', NEW.stage || ' taken');
    END IF;
    IF TG_OP = 'UPDATE' AND OLD.stage = 'lookup'
        AND (NEW.stage <> 'lookup' OR NEW.state IN ('SUCCEEDED', 'FAILED', 'CANCELLED')) THEN
        PERFORM pg_notify('byline_answered', NEW.id::text);
    END IF;
    RETURN NULL;
END $$;
"""

_OLD = """
CREATE OR REPLACE FUNCTION byline_job_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('byline_jobs', NEW.id::text);
    RETURN NULL;
END $$;
"""


def upgrade() -> None:
    op.execute(_NEW)


def downgrade() -> None:
    op.execute(_OLD)
