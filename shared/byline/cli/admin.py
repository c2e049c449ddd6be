"""``byline admin``: what an operator does at night, over the API alone.

Why it exists: whoever is woken needs few verbs, each of which says what it did, works from any machine that reaches the
gateway, and can be scripted (``--json``; times in ISO 8601, durations in seconds). Commands that others use by day too
(releases, labels, doctor, ...) are found here under the same names.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from byline.cli import admin_jobs
from byline.cli.operator import Address, AsJson, line, open_operator, say
from byline.client.operations import OperatorClient
from byline.client.values import StageStatus, WorkerStatus
from byline.errors import CallTimedOut

#: Commands of ``byline`` that are verbs of an operator as well.
SHARED = ("releases", "labels", "curation", "drift", "corpus", "keys", "audit", "backup", "doctor", "status")


class AdminGroup(TyperGroup):
    """Also finds the shared commands; each is imported when it is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import a shared command when it is asked for."""
        from byline.cli.app import COMMANDS, load_command

        if args and args[0] in SHARED and args[0] in COMMANDS:
            self.commands[args[0]] = load_command(args[0])
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=AdminGroup, no_args_is_help=True,
    help="Queues, workers, dead jobs; pause, resume, drain. Also here, as without `admin`: " + ", ".join(SHARED) + ".",
)  # fmt: skip
app.add_typer(admin_jobs.app, name="jobs")

Stage = Annotated[str, typer.Argument(help="lookup, estimate, verify or rank.")]


@app.command("queues")
def queues(address: Address = None, as_json: AsJson = False) -> None:
    """How much work waits in each stage, since when, and what is paused."""
    with open_operator(address) as client:
        stages = client.queues().stages
    if as_json:
        return say({"stages": [asdict(stage) for stage in stages]})
    table = Table("stage", "queued", "running", "oldest wait", "", box=None, pad_edge=False)
    for stage in stages:
        waited = f"{stage.oldest_wait.total_seconds():.1f} s" if stage.oldest_wait else ""
        table.add_row(
            stage.stage, str(stage.queued), str(stage.running), waited, "[yellow]paused[/]" if stage.paused else ""
        )
    Console().print(table)
    return None


@app.command("workers")
def workers(address: Address = None, as_json: AsJson = False) -> None:
    """Who works, on which release, and who is drained."""
    with open_operator(address) as client:
        found = client.queues().workers
    if as_json:
        return say({"workers": [asdict(worker) for worker in found]})
    table = Table("worker", "queue", "release", "state", "heard", "error", box=None, pad_edge=False)
    now = datetime.now(UTC)
    for worker in found:
        heard = f"{(now - worker.last_seen_time).total_seconds():.0f} s ago" if worker.last_seen_time else ""
        table.add_row(
            worker.worker_id, worker.queue, worker.release_id, _state(worker), heard, escape(worker.error)
        )
    Console(soft_wrap=True).print(table)
    return None


@app.command("pause")
def pause(stage: Stage, address: Address = None, as_json: AsJson = False) -> None:
    """Let no job begin this stage until `resume`. Jobs are accepted and wait; what runs goes on."""
    with open_operator(address) as client:
        _say_stage(client.stage(stage, paused=True), as_json)


@app.command("resume")
def resume(stage: Stage, address: Address = None, as_json: AsJson = False) -> None:
    """End a pause."""
    with open_operator(address) as client:
        _say_stage(client.stage(stage, paused=False), as_json)


@app.command("drain")
def drain(
    worker: Annotated[str, typer.Argument(help="As `byline admin workers` names it.")],
    reason: Annotated[str, typer.Option(help="Why, for whoever finds it drained.")] = "",
    undo: Annotated[bool, typer.Option("--undo", help="Let it take work again.")] = False,
    wait_s: Annotated[float, typer.Option("--wait", help="Seconds to wait until it holds nothing.")] = 0.0,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Let one worker take no new work. It ends what it runs and stays up; jobs go to the others."""
    with open_operator(address) as client:
        status = client.resume_worker(worker) if undo else client.drain(worker, reason)
        if wait_s > 0 and not undo:
            status = _wait_until_drained(client, worker, wait_s)
    if as_json:
        return say(asdict(status))
    return line(f"{status.worker_id}: {_state(status)}")


def _wait_until_drained(client: OperatorClient, worker: str, wait_s: float) -> WorkerStatus:
    ends = time.monotonic() + wait_s
    while True:
        found = next((one for one in client.queues().workers if one.worker_id == worker), None)
        if found is not None and found.drained_time is not None:
            return found
        if time.monotonic() >= ends:
            raise CallTimedOut(f"{worker} still works after {wait_s:g} s; it stays draining", worker=worker)
        time.sleep(min(0.5, wait_s))


def _state(worker: WorkerStatus) -> str:
    if worker.drained_time is not None:
        return "drained"
    return "draining" if worker.draining else "working"


def _say_stage(stage: StageStatus, as_json: bool) -> None:
    if as_json:
        say(asdict(stage))
        return
    line(f"{stage.stage}: {'paused' if stage.paused else 'running'}, {stage.queued} queued, {stage.running} running")

