"""``byline submit`` and ``byline watch``: ask about an image, follow the job.

Why it exists: the shortest way from an image file to the names behind it. Both print the job's id first, so that
an interrupted terminal loses nothing: the job goes on and ``byline watch`` finds it again.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from byline.cli.show import print_job
from byline.client import Client, Job
from byline.client.connection import client_options
from byline.config import load_settings

TIERS = "RETRIEVED (milliseconds), ESTIMATED (the whole corpus by sketches, seconds) or VERIFIED (by the teacher)."

_STAGES = {"LOOKUP": "searching", "ESTIMATE": "estimating", "VERIFY": "verifying"}

Address = Annotated[str | None, typer.Option(help="host:port of the gateway (BYLINE_GRPC_ADDRESS).")]
Project = Annotated[str | None, typer.Option(help="Project (BYLINE_PROJECT_ID).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def open_client(address: str | None, project: str | None) -> Client:
    """A client of the running gateway, or of the one named."""
    settings = load_settings()
    return Client(address or settings.grpc_address, project or settings.project_id, **client_options(settings))


def submit(
    image: Annotated[Path, typer.Argument(help="PNG, JPEG or WebP file of the generated image.")],
    prompt: Annotated[str, typer.Option(help="The prompt it was generated from.")] = "",
    tier: Annotated[str, typer.Option(help=TIERS)] = "RETRIEVED",
    top_k: Annotated[int | None, typer.Option(help="How many sources to name.")] = None,
    candidates: Annotated[int | None, typer.Option(help="How many candidates the teacher verifies.")] = None,
    best_effort: Annotated[bool, typer.Option(help="Keep the fast answer if verification fails.")] = False,
    labelling_consent: Annotated[
        bool, typer.Option("--labelling-consent", help="The operator may learn from this query and its answer.")
    ] = False,
    request_id: Annotated[str | None, typer.Option(help="UUID; repeating it gives the same job.")] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the answer and show it.")] = True,
    as_json: AsJson = False,
    address: Address = None,
    project: Project = None,
) -> None:
    """Ask which training images made an image possible."""
    with open_client(address, project) as client:
        job = client.submit(
            image, prompt, tier, top_k, candidates=candidates, best_effort=best_effort, request_id=request_id,
            labelling_consent=labelling_consent,
        )  # fmt: skip
        if wait:
            _notice(job)
            job = follow(client.watch(job))
        elif not as_json:
            typer.echo(job.id)
            return
        print_job(job, as_json=as_json)
    raise typer.Exit(_exit_code(job))


def watch(
    job: Annotated[str, typer.Argument(help="Id or name of the job.")],
    timeout: Annotated[float | None, typer.Option(help="Give up after so many seconds; the job goes on.")] = None,
    as_json: AsJson = False,
    address: Address = None,
    project: Project = None,
) -> None:
    """Follow a job until it ends, then show its answer."""
    with open_client(address, project) as client:
        ended = follow(client.watch(job, timeout=timeout))
        print_job(ended, as_json=as_json)
    raise typer.Exit(_exit_code(ended))


def follow(states: Iterable[Job]) -> Job:
    """Show the changes of a job as they come; the last one."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    last: Job | None = None
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("queued", total=None)
        for last in states:
            what = _STAGES.get(last.stage, last.state.lower())
            text = f"{what} (waiting)" if last.state == "QUEUED" else what
            bar.update(task, description=text, completed=last.progress_done, total=last.progress_total or None)
    if last is None:
        raise RuntimeError("a watch ended without a message")
    return last


def _notice(job: Job) -> None:
    Console(stderr=True).print(f"job [bold]{job.id}[/bold]", highlight=False)


def _exit_code(job: Job) -> int:
    """0 unless the job ended without the answer that was asked for."""
    return 1 if job.state in ("FAILED", "CANCELLED") else 0
