"""``byline admin jobs``: find a job, see what happened to it, repeat or put aside the dead ones.

Why it exists: "why is this job not done?" is the question of most nights; its answer is the job's history.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from byline.cli.operator import Address, AsJson, line, open_operator, say
from byline.client.values import Job
from byline.errors import BylineError, InvalidRequest, ServerUnreachable

app = typer.Typer(help="List, show, cancel; dead jobs: list, retry, discard.", no_args_is_help=True)

Project = Annotated[str | None, typer.Option(help="Project (BYLINE_PROJECT_ID).")]
Name = Annotated[str, typer.Argument(help="Id of the job, or its resource name (for another project's).")]
Names = Annotated[list[str] | None, typer.Argument(help="Ids or resource names of dead jobs.")]
Limit = Annotated[int, typer.Option(help="At most so many.", min=1)]
Every = Annotated[bool, typer.Option("--all", help="All dead jobs, of the project if one is named.")]
Most = Annotated[int | None, typer.Option("--limit", help="With --all: at most so many, latest first.", min=1)]


@app.command("list")
def list_jobs(
    state: Annotated[list[str] | None, typer.Option(help="QUEUED, RUNNING, ...; several are possible.")] = None,
    project: Project = None, limit: Limit = 50, address: Address = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """A project's jobs, newest first."""
    with open_operator(address, project) as client:
        _print(client.list(state or (), limit), as_json)


@app.command("dead")
def dead(
    project: Annotated[str | None, typer.Option(help="Only this project's; default: all.")] = None,
    limit: Limit = 50, address: Address = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Jobs that used up their attempts and that nobody has dealt with."""
    with open_operator(address) as client:
        _print(client.dead_jobs(project, limit), as_json)


@app.command("show")
def show(job: Name, project: Project = None, address: Address = None, as_json: AsJson = False) -> None:
    """What happened to a job, step by step, and under which trace its log lines are found."""
    with open_operator(address, project) as client:
        history = client.history(job)
    if as_json:
        return say(asdict(history))
    table = Table("time", "", "stage", "by", "claims", "why", box=None, pad_edge=False)
    for event in history.events:
        change = f"{event.from_state} → {event.to_state}" if event.from_state else event.to_state
        table.add_row(
            f"{event.time:%Y-%m-%d %H:%M:%S.%f}"[:-3], change, event.stage, event.actor, str(event.fence),
            escape(event.reason),
        )  # fmt: skip
    Console(soft_wrap=True).print(table)
    trace = history.traceparent.split("-")[1] if history.traceparent else "none"
    return line(f"trace: {trace}")


@app.command("cancel")
def cancel(job: Name, project: Project = None, address: Address = None, as_json: AsJson = False) -> None:
    """Cancel a job; one that runs stops at its next check."""
    with open_operator(address, project) as client:
        _print([client.cancel(job)], as_json)


@app.command("retry")
def retry(
    jobs: Names = None, every: Every = False, project: Project = None, limit: Most = None, address: Address = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Repeat dead jobs as new ones, which are printed. Repeating the call gives the same new jobs. One that is refused
    is told and does not keep the others (exit code 1)."""
    with open_operator(address, project) as client:
        _each(_chosen(jobs, every, lambda: client.dead_jobs(project, limit)), client.retry, as_json)


@app.command("discard")
def discard(
    jobs: Names = None, every: Every = False, project: Project = None, limit: Most = None, address: Address = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Put dead jobs aside: they stay FAILED and are listed no more. One that is refused is told (exit code 1)."""
    with open_operator(address, project) as client:
        _each(_chosen(jobs, every, lambda: client.dead_jobs(project, limit)), client.discard, as_json)


def _chosen(jobs: list[str] | None, every: bool, dead: Callable[[], Sequence[Job]]) -> list[str]:
    if bool(jobs) is every:
        raise InvalidRequest("jobs", "name some dead jobs, or say --all")
    return [job.name for job in dead()] if every else list(jobs or ())


def _each(names: Sequence[str], act: Callable[[str], Job], as_json: bool) -> None:
    """Act on every job and print what was done; of several, one that is refused is told and the others go on."""
    done, refused = [], []
    for name in names:
        try:
            done.append(act(name))
        except ServerUnreachable:
            _print(done, as_json)
            raise
        except BylineError as error:
            if len(names) == 1:
                raise
            refused.append(f"{name}: {error.reason}: {error.message}")
    _print(done, as_json)
    for told in refused:
        typer.echo(told, err=True)
    if refused:
        raise typer.Exit(1)


def _print(jobs: Sequence[Job], as_json: bool) -> None:
    if as_json:
        return say({"jobs": [asdict(job) for job in jobs]})
    table = Table("job", "project", "state", "tier", "attempt", "made", "error", box=None, pad_edge=False)
    for job in jobs:
        made = f"{job.create_time:%Y-%m-%d %H:%M:%S}" if job.create_time else ""
        error = f"{job.error.reason}: {job.error.message}" if job.error else ""
        table.add_row(
            job.id, job.name.split("/")[1], job.state, job.tier, str(job.attempt), made, escape(error[:120])
        )
    Console(soft_wrap=True).print(table)
    return None
