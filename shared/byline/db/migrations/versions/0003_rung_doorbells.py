"""An index over the doorbells that are out.

Why it exists: the dispatcher counts them on every pass, and must not read the whole backlog for it.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "ix_jobs_rung",
        "jobs",
        ["stage", "dispatched_at"],
        postgresql_where=sa.text("state = 'QUEUED' AND dispatched_at IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_rung", table_name="jobs")
