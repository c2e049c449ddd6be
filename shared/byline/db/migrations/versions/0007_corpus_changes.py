"""What a changing corpus keeps: additions, near-duplicate groups, withdrawal receipts.

Revision ID: 0007
Revises: 0006
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_NOW = sa.text("now()")
_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column("corpora", sa.Column("sequence", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("items", sa.Column("added_sequence", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("items", sa.Column("look_hash", sa.BigInteger(), nullable=True))
    op.add_column("items", sa.Column("look", sa.LargeBinary(), nullable=True))
    op.create_index("ix_items_corpus_id_added_sequence", "items", ["corpus_id", "added_sequence"])
    op.create_table(
        "release_deltas",
        sa.Column("release_id", sa.Text(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("corpus_sequence", sa.BigInteger(), server_default="-1", nullable=False),
        sa.Column("updated_at", _TIME, server_default=_NOW, nullable=False),
        sa.PrimaryKeyConstraint("release_id", name="pk_release_deltas"),
        sa.ForeignKeyConstraint(
            ["release_id"], ["releases.id"], ondelete="CASCADE", name="fk_release_deltas_release_id_releases"
        ),
    )
    op.create_table(
        "release_delta_items",
        sa.Column("release_id", sa.Text(), nullable=False),
        sa.Column("item_id", sa.BigInteger(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("embedding", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", _TIME, server_default=_NOW, nullable=False),
        sa.PrimaryKeyConstraint("release_id", "item_id", name="pk_release_delta_items"),
        sa.ForeignKeyConstraint(
            ["release_id"], ["release_deltas.release_id"], ondelete="CASCADE",
            name="fk_release_delta_items_release_id_release_deltas",
        ),
        sa.ForeignKeyConstraint(["item_id"], ["items.item_id"], name="fk_release_delta_items_item_id_items"),
    )
    op.create_index(
        "ix_release_delta_items_release_id_sequence", "release_delta_items", ["release_id", "sequence"]
    )
    op.create_table(
        "withdrawals",
        sa.Column("id", postgresql.UUID(as_uuid=True), nullable=False),
        sa.Column("corpus_id", sa.Text(), nullable=False),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.Column("criterion", postgresql.JSONB(), nullable=False),
        sa.Column("reason", sa.Text(), server_default="", nullable=False),
        sa.Column("purged_at", _TIME, nullable=True),
        sa.Column("purged", postgresql.JSONB(), server_default=sa.text("'{}'::jsonb"), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_withdrawals"),
        sa.ForeignKeyConstraint(["corpus_id"], ["corpora.id"], name="fk_withdrawals_corpus_id_corpora"),
    )
    op.create_index("ix_withdrawals_corpus_id_at", "withdrawals", ["corpus_id", "at"])
    op.create_table(
        "withdrawal_items",
        sa.Column("withdrawal_id", postgresql.UUID(as_uuid=True), nullable=False),
        sa.Column("item_id", sa.BigInteger(), nullable=False),
        sa.Column("image_sha256", sa.Text(), nullable=False),
        sa.Column("already", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.PrimaryKeyConstraint("withdrawal_id", "item_id", name="pk_withdrawal_items"),
        sa.ForeignKeyConstraint(
            ["withdrawal_id"], ["withdrawals.id"], name="fk_withdrawal_items_withdrawal_id_withdrawals"
        ),
    )
    op.create_index("ix_withdrawal_items_item_id", "withdrawal_items", ["item_id"])


def downgrade() -> None:
    for table in ("withdrawal_items", "withdrawals", "release_delta_items", "release_deltas"):
        op.drop_table(table)
    op.drop_index("ix_items_corpus_id_added_sequence", "items")
    for column in ("look", "look_hash", "added_sequence"):
        op.drop_column("items", column)
    op.drop_column("corpora", "sequence")
