"""``byline doctor``: what is wrong with this installation, and what to do about it.

Why it exists: see ``byline.doctor``; this prints its findings. A script reads ``--json`` and the exit code.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from byline.client.connection import client_options
from byline.config import load_settings

_MARKS = {
    "ok": "[green]ok     [/]", "skipped": "[dim]skipped[/]", "warning": "[yellow]warning[/]",
    "failure": "[red]failure[/]",
}  # fmt: skip


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    digests: Annotated[bool, typer.Option(help="Read the active releases whole and compare digests.")] = True,
) -> None:
    """Check servers, schema, clocks, disk, releases and workers. Exit code 1 if anything fails outright."""
    from byline.doctor import Level, examine, worst

    settings = load_settings()
    findings = examine(settings, digests=digests, credentials=client_options(settings).get("credentials"))
    level = worst(findings)
    if as_json:
        typer.echo(json.dumps({"level": level, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        console = Console(soft_wrap=True, highlight=False)
        width = max(len(finding.check) for finding in findings)
        for finding in findings:
            console.print(f"{_MARKS[finding.level]} {finding.check:<{width}}  {escape(finding.found)}")
            if finding.advice:
                console.print(f"{'':<8}{'':<{width}}  → {escape(finding.advice)}")
    if level is Level.FAILURE:
        raise typer.Exit(1)
