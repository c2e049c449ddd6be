"""Alembic's entry: runs migrations on the connection that ``byline.db.migration`` hands over.

Why it exists: Alembic loads it by path. For authoring a new revision from a checkout, set
``BYLINE_DATABASE_URL`` and call ``alembic -c`` with a config whose script_location is this directory.
"""

from __future__ import annotations

from alembic import context

from byline.db.models import Base

connection = context.config.attributes.get("connection")
if connection is None:
    raise RuntimeError("run migrations through byline.db.migration.migrate(url)")
context.configure(connection=connection, target_metadata=Base.metadata, compare_type=True, compare_server_default=False)
with context.begin_transaction():
    context.run_migrations()
