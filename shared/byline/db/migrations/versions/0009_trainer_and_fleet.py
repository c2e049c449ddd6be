"""What operators ask of the trainer, which release each worker serves, and whose files were removed.

Revision ID: 0009
Revises: 0008
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_NOW = sa.text("now()")


def _time(name: str, required: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=not required, server_default=_NOW if required else None)


def upgrade() -> None:
    op.create_table(
        "refresh_requests",
        sa.Column("id", sa.UUID(), nullable=False),
        sa.Column("model_id", sa.Text(), nullable=False),
        _time("requested_at", required=True),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False, server_default=""),
        _time("handled_at"),
        sa.Column("release_id", sa.Text()),
        sa.Column("error", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_refresh_requests"),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_refresh_requests_model_id_models"),
    )
    op.create_index("ix_refresh_requests_waiting", "refresh_requests", ["model_id", "requested_at"],
                    postgresql_where=sa.text("handled_at IS NULL"))
    op.create_table(
        "worker_releases",
        sa.Column("worker_id", sa.Text(), nullable=False),
        sa.Column("model_id", sa.Text(), nullable=False),
        sa.Column("release_id", sa.Text()),
        sa.Column("loading", sa.Text()),
        sa.Column("error", sa.Text()),
        _time("since", required=True),
        sa.PrimaryKeyConstraint("worker_id", "model_id", name="pk_worker_releases"),
        sa.ForeignKeyConstraint(["worker_id"], ["worker_reports.worker_id"], ondelete="CASCADE",
                                name="fk_worker_releases_worker_id_worker_reports"),
    )
    op.add_column("releases", _time("collected_at"))


def downgrade() -> None:
    op.drop_column("releases", "collected_at")
    op.drop_table("worker_releases")
    op.drop_table("refresh_requests")
