"""Triggers that guard and announce every change of a job.

Why it exists: three promises must hold whoever writes to ``jobs``, a person with psql included. A terminal
state is never left; ``revision`` and ``update_time`` move with every change a watcher may see (not with
heartbeats that change nothing, nor with the dispatcher's marks); and every such change notifies
``byline_jobs`` in its own transaction.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_FUNCTIONS = """
CREATE FUNCTION byline_job_updating() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.state IN ('SUCCEEDED', 'FAILED', 'CANCELLED') AND NEW.state <> OLD.state THEN
        RAISE EXCEPTION 'job % is % and stays so', OLD.id, OLD.state USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.fence < OLD.fence THEN
        RAISE EXCEPTION 'the fence of job % never goes back', OLD.id USING ERRCODE = 'check_violation';
    END IF;
    IF (NEW.state, NEW.stage, NEW.fence, NEW.attempt, NEW.release_id, NEW.progress_done, NEW.progress_total,
        NEW.cancel_requested_at, NEW.next_attempt_at, NEW.error)
        IS DISTINCT FROM
       (OLD.state, OLD.stage, OLD.fence, OLD.attempt, OLD.release_id, OLD.progress_done, OLD.progress_total,
        OLD.cancel_requested_at, OLD.next_attempt_at, OLD.error) THEN
        NEW.revision := OLD.revision + 1;
        NEW.update_time := now();
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION byline_job_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('byline_jobs', NEW.id::text);
    RETURN NULL;
END $$;
"""

_TRIGGERS = """
CREATE TRIGGER job_updating BEFORE UPDATE ON jobs
    FOR EACH ROW EXECUTE FUNCTION byline_job_updating();
CREATE TRIGGER job_inserted AFTER INSERT ON jobs
    FOR EACH ROW EXECUTE FUNCTION byline_job_changed();
CREATE TRIGGER job_updated AFTER UPDATE ON jobs
    FOR EACH ROW WHEN (OLD.revision IS DISTINCT FROM NEW.revision) EXECUTE FUNCTION byline_job_changed();
"""


def upgrade() -> None:
    op.execute(_FUNCTIONS)
    op.execute(_TRIGGERS)


def downgrade() -> None:
    for trigger in ("job_updating", "job_inserted", "job_updated"):
        op.execute(f"DROP TRIGGER {trigger} ON jobs")
    for function in ("byline_job_updating", "byline_job_changed"):
        op.execute(f"DROP FUNCTION {function}()")
