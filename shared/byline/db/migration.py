"""Bring a database to the newest schema, from any service, any number of times at once.

Why it exists: services start together against an empty database; an advisory lock lets one of them
migrate while the others wait, and the Alembic scripts travel inside the package, so an installed wheel
needs no checkout.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.pool import NullPool

from byline.db.session import database_url, transaction

_LOCK = 0x62796C696E65  # "byline" in ASCII: any constant that nobody else uses


def alembic_config() -> Config:
    """Alembic's configuration without an ini file: the scripts lie beside this module."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def migrate(url: str) -> str:
    """Run every missing migration and return the revision reached. Raises ``DatabaseUnavailable``."""
    engine = create_engine(database_url(url), poolclass=NullPool, connect_args={"connect_timeout": 5})
    config = alembic_config()
    with transaction(engine) as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    return head()


def head() -> str:
    """The newest revision this code knows."""
    revision = ScriptDirectory.from_config(alembic_config()).get_current_head()
    if revision is None:
        raise RuntimeError("the package holds no migrations")
    return revision


def is_current(engine: Engine) -> bool:
    """Whether the database is at the revision this code knows (a readiness condition)."""
    with transaction(engine) as connection:
        return MigrationContext.configure(connection).get_current_revision() == head()
