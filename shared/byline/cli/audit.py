"""``byline audit``: look at the audit and check its chain.

Why it exists: an audit that nobody can check is a log file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine, text

from byline.config import load_settings
from byline.db import make_engine, transaction
from byline.errors import InvalidRequest
from byline.security.audit import AuditLog, Head
from byline.security.signing import Keyring

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Look at the audit and check its chain.")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_LIST = text("""
SELECT e.id, e.at, e.principal, e.project_id, e.action, e.resource, e.decision, e.detail, c.seq
FROM audit_events e LEFT JOIN audit_chain c ON c.event_id = e.id
WHERE (CAST(:action AS text) IS NULL OR e.action = :action)
    AND (CAST(:project AS text) IS NULL OR e.project_id = :project)
    AND (CAST(:resource AS text) IS NULL OR e.resource LIKE '%' || :resource || '%')
ORDER BY e.id DESC LIMIT :most
""")


@app.command("verify")
def verify(
    head: Annotated[
        str | None, typer.Option(help="An end of the chain noted earlier (SEQ:HASH): proves that nothing was cut off.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Follow the whole hash chain. Exit code 1 and the first broken link if it does not hold."""
    try:
        known = None if head is None else Head.parse(head)
    except ValueError as error:
        raise InvalidRequest("head", "must be SEQ:HASH as this command prints it", value=head) from error
    with _engine() as engine:
        log = AuditLog(engine, Keyring.parse(load_settings().signing_key))
        while log.seal(thorough=True):
            pass
        found = log.verify(known)
    if as_json:
        report = {"links": found.head.seq, "signed": found.signed, "unsealed": found.unsealed, "head": str(found.head)}
        typer.echo(json.dumps(report, indent=1))
        return
    typer.echo(f"the audit holds: {found.head.seq} events, {found.signed} of them signed")
    typer.echo(f"head {found.head}")


@app.command("list")
def list_events(
    action: Annotated[str | None, typer.Option(help="Only this action, for instance WithdrawItems.")] = None,
    project: Annotated[str | None, typer.Option(help="Only this project.")] = None,
    resource: Annotated[str | None, typer.Option(help="Only resources with this in their name.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Show the latest events: who did what, when, and what was decided."""
    values = {"action": action, "project": project, "resource": resource, "most": limit}
    with _engine() as engine, transaction(engine) as connection:
        rows = [dict(row) for row in connection.execute(_LIST, values).mappings()]
    if as_json:
        typer.echo(json.dumps(rows, indent=1, default=str))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("at", "who", "project", "action", "resource", "decision", "detail"):
        whole = column == "action"
        table.add_column(column, overflow="fold", no_wrap=whole, min_width=22 if whole else None)
    for row in rows:
        table.add_row(
            f"{row['at']:%Y-%m-%d %H:%M:%S}", row["principal"], row["project_id"] or "", row["action"], row["resource"],
            row["decision"], json.dumps(row["detail"]) if row["detail"] else "",
        )  # fmt: skip
    Console().print(table)


@contextmanager
def _engine() -> Iterator[Engine]:
    engine = make_engine(load_settings().database_url, pool_size=1, application="byline-audit")
    try:
        yield engine
    finally:
        engine.dispose()
