"""Which queries a ranking job labels, now that one job may label several.

Why it exists: curation asks for every planned query whether a job takes care of it; until now the request id of
the job named its one query. Jobs from before are entered from their payload.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "job_queries",
        sa.Column("job_id", sa.UUID(), nullable=False),
        sa.Column("query_id", sa.UUID(), nullable=False),
        sa.Column("teacher", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_job_queries_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "query_id", name=op.f("pk_job_queries")),
    )
    op.create_index("ix_job_queries_query_id", "job_queries", ["query_id"])
    op.execute(
        """
        INSERT INTO job_queries (job_id, query_id, teacher)
        SELECT id, CAST(payload->>'query_id' AS uuid), COALESCE(payload->>'teacher', '') FROM jobs
        WHERE kind = 'ranking' AND payload->>'query_id' ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
        """
    )


def downgrade() -> None:
    op.drop_index("ix_job_queries_query_id", table_name="job_queries")
    op.drop_table("job_queries")
