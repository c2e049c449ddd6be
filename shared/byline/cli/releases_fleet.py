"""``byline releases status``, ``refresh`` and ``gc``: the fleet, the trainer and the disk.

Why it exists: what an operator asks after an activation (has everybody swapped?), before one (make me a new one), and
when a disk fills up. The first two go through the gateway; ``gc`` removes files and runs where they are.
"""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from byline.cli.operator import Address, AsJson, line, say
from byline.client.connection import client_options
from byline.client.releases import FleetStatus, ReleaseClient
from byline.config import load_settings
from byline.errors import BylineError, CallTimedOut

Model = Annotated[str | None, typer.Option("--model", help="Model id; default: the configured one.")]
_LOOK_S = 1.0


class RefreshFailed(BylineError):
    """The trainer made no candidate; the message says why."""

    reason = "REFRESH_FAILED"
    code = "FAILED_PRECONDITION"


def register(app: typer.Typer) -> None:
    """Add these commands to ``byline releases``."""
    app.command("status")(status)
    app.command("refresh")(refresh)
    app.command("gc")(collect)


def status(model: Model = None, address: Address = None, as_json: AsJson = False) -> None:
    """Which release every worker serves, loads, or could not load, and since when; and what holds the trainer."""
    with _client(address) as client:
        fleet = client.fleet(model or load_settings().model_id)
    if as_json:
        active = None if fleet.active is None else asdict(fleet.active)
        say({"active": active, "swapped": fleet.swapped, "rolled_back_from": fleet.rolled_back_from,
             "workers": [asdict(worker) for worker in fleet.workers]})
        return
    _print(fleet)


def refresh(
    reason: Annotated[str, typer.Option(help="Why; recorded in the release's manifest.")] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the candidate, and say what became of it.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait at most.")] = 3600.0,
    model: Model = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Ask the trainer to fit and judge a new head now, whatever else it waits for."""
    model_id = model or load_settings().model_id
    with _client(address) as client:
        asked = client.refresh(model_id, reason)
        ends, pause = time.monotonic() + timeout, threading.Event()
        while wait and asked.end_time is None:
            if time.monotonic() >= ends:
                raise CallTimedOut(f"no candidate after {timeout:.0f} s; it is still asked for: {asked.name}")
            pause.wait(_LOOK_S)
            asked = client.refresh_status(asked.name)
        made = next((one for one in client.releases(model_id)[0] if one.id == asked.release), None)
    if as_json:
        say({**asdict(asked), "state": made.state if made else None, "verdict": made.reason if made else None})
    elif asked.end_time is None:
        line(f"asked for: {asked.name}")
    elif made is not None:
        line(f"{made.id}: {made.state} ({made.reason or 'no reason given'})")
    if asked.error:
        raise RefreshFailed(asked.error)


def collect(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go; remove nothing.")] = False,
    keep: Annotated[int | None, typer.Option(help="Keep this many of the newest (BYLINE_RELEASE_KEEP).")] = None,
    days: Annotated[float | None, typer.Option(help="Keep all younger ones (BYLINE_RELEASE_KEEP_DAYS).")] = None,
    model: Model = None,
    as_json: AsJson = False,
) -> None:
    """Remove the files of old releases; never of one that answers, that a rollback needs, or that a job uses."""
    from byline.db import make_engine
    from byline.releases.garbage import GarbageCollector, KeepRule

    settings = load_settings()
    rule = KeepRule(settings.release_keep if keep is None else keep,
                    timedelta(days=settings.release_keep_days if days is None else days))
    engine = make_engine(settings.database_url, pool_size=1)
    try:
        collector = GarbageCollector(engine, settings.release_dir, rule)
        model_id, now = model or settings.model_id, datetime.now(UTC)
        done = None if dry_run else collector.collect(model_id, now)
        plan = collector.plan(model_id, now) if done is None else done.plan
    finally:
        engine.dispose()
    if as_json:
        say({"dry_run": dry_run, "remove": list(plan.remove), "keep": {one.release_id: one.why for one in plan.keep},
             "leftovers": [path.name for path in plan.leftovers], "freed_bytes": 0 if done is None else done.freed})
        return
    table = Table("release", "files", "why")
    for one in plan.keep:
        table.add_row(one.release_id, "stay", one.why)
    for name in (*plan.remove, *(path.name for path in plan.leftovers)):
        table.add_row(name, "would go" if dry_run else "removed", "")
    Console().print(table)
    if done is not None:
        line(f"{len(done.removed)} releases, {done.freed / 1e6:.1f} MB freed")


def _client(address: str | None) -> ReleaseClient:
    settings = load_settings()
    return ReleaseClient(address or settings.grpc_address, settings.project_id, **client_options(settings))


def _print(fleet: FleetStatus) -> None:
    console = Console()
    if fleet.active is None:
        console.print("no release is active")
    else:
        console.print(f"active: {fleet.active.release.rpartition('/')[2]}, epoch {fleet.active.epoch}", highlight=False)
    if fleet.rolled_back_from:
        console.print(f"held: {fleet.rolled_back_from} was left by a rollback, so the trainer activates no new head; "
                      "`byline releases refresh`, or activating a newer release, ends that", highlight=False)
    table = Table("", "worker", "serves", "loads", "since", "error")
    for worker in fleet.workers:
        table.add_row("✓" if worker.current else "", worker.worker_id, worker.release, worker.loading,
                      f"{worker.since:%Y-%m-%d %H:%M:%S}" if worker.since else "", escape(worker.error))
    console.print(table if fleet.workers else "no worker answers for this model")
