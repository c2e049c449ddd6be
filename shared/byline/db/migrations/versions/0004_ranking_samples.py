"""How many loss evaluations each tau of a ranking rests on.

Why it exists: an adaptive teacher spends more noise on some candidates than on others, so one number
of draws per ranking no longer says it. NULL: not recorded, every candidate had the same.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("rankings", sa.Column("samples", sa.LargeBinary(), nullable=True))


def downgrade() -> None:
    op.drop_column("rankings", "samples")
