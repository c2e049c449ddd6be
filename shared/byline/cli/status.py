"""``byline status``: one look at what runs, which release answers and how long the queues are."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from byline.config import Settings, load_settings
from byline.db import make_engine
from byline.embedded import discover
from byline.embedded.status import read_status

_NOT_RUNNING = 3
_QUERIES = {
    "releases": "SELECT model_id, release_id, previous_release_id, epoch FROM active_releases ORDER BY model_id",
    "jobs": "SELECT kind, state, coalesce(stage, '') AS stage, count(*) AS jobs,"
    " round(extract(epoch FROM now() - min(create_time)))::bigint AS oldest_seconds"
    " FROM jobs WHERE state IN ('QUEUED', 'RUNNING', 'CANCELLING') GROUP BY 1, 2, 3 ORDER BY 1, 2, 3",
    "workers": "SELECT worker_id, queue, release_id, error,"
    " round(extract(epoch FROM now() - last_seen))::bigint AS seen_seconds_ago FROM worker_reports ORDER BY worker_id",
}


def status(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show processes, active releases, unfinished jobs and workers. Exit code 3 when nothing runs here."""
    settings = load_settings()
    servers = discover(settings.state_dir)
    running = servers is not None or bool(settings.configured_database_url)
    report: dict[str, Any] = {
        "running": running,
        "state_dir": str(settings.state_dir),
        "grpc_address": settings.grpc_address,
        "processes": [
            {"name": line.name, "state": line.state, "pid": line.pid, "crashes": line.crashes, "log": line.log}
            for line in read_status(settings.state_dir)
            if servers is not None
        ],
    }
    if running:
        report |= _from_database(settings)
    if as_json:
        typer.echo(json.dumps(report, indent=1, default=str))
    else:
        _print(report)
    if not running:
        raise typer.Exit(_NOT_RUNNING)


def _from_database(settings: Settings) -> dict[str, Any]:
    engine = make_engine(settings.database_url, pool_size=1)
    try:
        with engine.connect() as connection:
            return {
                name: [dict(row) for row in connection.execute(text(query)).mappings()]
                for name, query in _QUERIES.items()
            }
    except SQLAlchemyError as error:
        return {"database_error": str(error.__cause__ or error).strip().splitlines()[0]}
    finally:
        engine.dispose()


def _print(report: dict[str, Any]) -> None:
    console = Console()
    if not report["running"]:
        console.print(f"nothing runs under {report['state_dir']}; start it with `byline up`")
        return
    console.print(f"gRPC {report['grpc_address']}   state {report['state_dir']}")
    if "database_error" in report:
        console.print(f"database: {report['database_error']}", markup=False)
    for name in ("processes", "releases", "jobs", "workers"):
        rows = report.get(name)
        if rows:
            console.print(_table(name, rows))


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    columns = [column for column in rows[0] if column != "log"]
    for column in columns:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*("" if row[column] is None else str(row[column]) for column in columns))
    return table
