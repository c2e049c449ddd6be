"""What the doctor asks Postgres: does it keep what it acknowledges, is the schema ours, are the clocks together?

Why it exists: promise 1 (an acknowledged job is never lost) is Postgres's settings as much as our code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text

from byline.db.migration import head
from byline.doctor.finding import Finding, Level, ok

#: Leases are by the database's clock alone; logs and audits of two machines are compared by theirs.
SKEW_WARNS_S = 1.0
SKEW_FAILS_S = 30.0
OLDEST_VERSION = 140_000
BUSY_SHARE = 0.8

#: setting -> (what it must be, what happens otherwise)
_DURABLE: Mapping[str, tuple[str, str]] = {
    "fsync": ("on", "a power cut may destroy the database"),
    "full_page_writes": ("on", "a power cut may leave half-written pages"),
    "synchronous_commit": ("on", "an acknowledged job may be lost in a crash"),
}
_SETTINGS = text("SELECT name, setting FROM pg_settings WHERE name = ANY(:names)")


def version(connection: Connection) -> Finding:
    """Is the server new enough?"""
    number = int(connection.execute(text("SHOW server_version_num")).scalar_one())
    shown = str(connection.execute(text("SHOW server_version")).scalar_one())
    if number < OLDEST_VERSION:
        return Finding("postgres.version", Level.FAILURE, shown, "Byline is tested from Postgres 14 on: upgrade")
    return ok("postgres.version", shown)


def durability(connection: Connection) -> list[Finding]:
    """Does it flush what it acknowledges?"""
    values = {row.name: row.setting for row in connection.execute(_SETTINGS, {"names": list(_DURABLE)})}
    return [
        ok(f"postgres.{name}", values.get(name, ""))
        if values.get(name) == wanted or (name == "synchronous_commit" and values.get(name, "").startswith("remote"))
        else Finding(f"postgres.{name}", Level.FAILURE, values.get(name, ""), f"set it to {wanted}: {otherwise}")
        for name, (wanted, otherwise) in _DURABLE.items()
    ]


def migrations(connection: Connection) -> Finding:
    """Is the schema the one that this code knows?"""
    current, newest = MigrationContext.configure(connection).get_current_revision(), head()
    if current == newest:
        return ok("postgres.migrations", f"at {newest}")
    if current is None:
        return Finding("postgres.migrations", Level.FAILURE, "no tables", "start a gateway once: it makes the tables")
    if current > newest:
        return Finding(
            "postgres.migrations", Level.FAILURE, f"at {current}, this program knows {newest}",
            "the database is newer than this program: upgrade the program, or restore the backup from before",
        )  # fmt: skip
    return Finding(
        "postgres.migrations", Level.FAILURE, f"at {current}, needs {newest}",
        "restart a gateway of this version: it migrates when it starts",
    )  # fmt: skip


def clock(connection: Connection, now: Callable[[], datetime]) -> Finding:
    """How far is this machine's clock from the database's? Half of the question's own time is taken off."""
    before = now()
    theirs: datetime = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
    after = now()
    apart = abs((theirs.astimezone(UTC) - (before + (after - before) / 2)).total_seconds())
    apart = max(0.0, apart - (after - before).total_seconds() / 2)
    found = f"{apart:.3f} s from the database's clock"
    if apart >= SKEW_WARNS_S:
        level = Level.FAILURE if apart >= SKEW_FAILS_S else Level.WARNING
        return Finding("clock", level, found, "run a time service (chrony, systemd-timesyncd) on both machines")
    return ok("clock", found)


def connections(connection: Connection) -> Finding:
    """Is there room for more programs?"""
    used, limit = connection.execute(
        text("SELECT (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),"
             " CAST(current_setting('max_connections') AS int)")
    ).one()  # fmt: skip
    if used > BUSY_SHARE * limit:
        advice = "raise max_connections or put a pooler in front; a gateway takes up to 20, a worker up to 10"
        return Finding("postgres.connections", Level.WARNING, f"{used} of {limit} used", advice)
    return ok("postgres.connections", f"{used} of {limit} used")
