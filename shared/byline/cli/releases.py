"""``byline releases``: which releases exist, which one answers, and changing that.

Why it exists: activating and rolling back are what an operator does at night; both go through the gateway
like everybody else's calls, conditionally where an epoch is given, with a reason for the audit trail.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from byline.cli import releases_fleet
from byline.client import ActiveRelease, Client, Release
from byline.client.connection import client_options
from byline.config import load_settings
from byline.errors import ReleaseNotFound

app = typer.Typer(help="List, activate and roll back releases; the fleet, refreshes, old files.", no_args_is_help=True)
releases_fleet.register(app)

Model = Annotated[str | None, typer.Option("--model", help="Model id; default: the configured one.")]
Address = Annotated[str | None, typer.Option(help="host:port of the gateway (BYLINE_GRPC_ADDRESS).")]
Epoch = Annotated[int | None, typer.Option(help="Only if the active release still has this epoch.")]
Reason = Annotated[str, typer.Option(help="Why; kept in the audit trail.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_releases(model: Model = None, address: Address = None, as_json: AsJson = False) -> None:
    """All releases of a model, newest first; the active one is marked."""
    releases, active = _fetch(model, address)
    if as_json:
        typer.echo(_to_json({"active": asdict(active) if active else None, "releases": [asdict(r) for r in releases]}))
        return
    table = Table("", "release", "state", "made", "because of", "items", "labels", "mAP", "reason")
    for release in releases:
        is_active = active is not None and _id(active.release) == release.id
        table.add_row(
            "→" if is_active else "", release.id, release.state + (", files gone" if release.collect_time else ""),
            _time(release.create_time), ", ".join(what for what, _ in release.refresh.triggers) if release.refresh
            else "", str(release.items),
            str(release.label_queries), _map(release), escape(release.reason),
        )  # fmt: skip
    console = Console()
    console.print(table)
    if active is None:
        console.print("no release is active")
    else:
        previous = f", before it {_id(active.previous_release)}" if active.previous_release else ""
        console.print(f"active: {_id(active.release)}, epoch {active.epoch}{previous}", highlight=False)


@app.command("show")
def show_release(
    release: Annotated[str, typer.Argument(help="Id of the release.")],
    model: Model = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Everything recorded of one release: features, labels, teacher, metrics of the gate."""
    releases, _active = _fetch(model, address)
    found = next((r for r in releases if release in (r.id, r.name)), None)
    if found is None:
        raise ReleaseNotFound(f"no release is registered as {release}", release_id=release)
    if as_json:
        typer.echo(_to_json(asdict(found)))
        return
    table = Table(show_header=False)
    for name, value in asdict(found).items():
        if name == "metrics":
            for metric, figure in sorted(value.items()):
                table.add_row(f"metrics.{metric}", f"{figure:.4g}")
        elif name == "sketches":
            table.add_row(name, escape(_sketches(found)))
        elif name == "refresh":
            table.add_row(name, escape(_refresh(found)))
        else:
            table.add_row(name, escape(_time(value) if isinstance(value, datetime) else str(value)))
    Console().print(table)


@app.command("activate")
def activate(
    release: Annotated[str, typer.Argument(help="Id of the release.")],
    epoch: Epoch = None,
    reason: Reason = "",
    model: Model = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Let a release answer from now on. Workers load it beside the old one and swap."""
    with _client(address) as client:
        _say(client.activate(model or load_settings().model_id, release, epoch, reason), as_json)


@app.command("rollback")
def rollback(
    epoch: Epoch = None, reason: Reason = "", model: Model = None, address: Address = None, as_json: AsJson = False
) -> None:
    """Let the release before the present one answer again, unless another activation comes first."""
    with _client(address) as client:
        _say(client.rollback(model or load_settings().model_id, epoch, reason), as_json)


def _client(address: str | None) -> Client:
    settings = load_settings()
    return Client(address or settings.grpc_address, settings.project_id, **client_options(settings))


def _fetch(model: str | None, address: str | None) -> tuple[list[Release], ActiveRelease | None]:
    with _client(address) as client:
        releases, active = client.releases(model or load_settings().model_id)
    return list(releases), active


def _say(active: ActiveRelease, as_json: bool) -> None:
    if as_json:
        typer.echo(_to_json(asdict(active)))
        return
    typer.echo(f"active: {_id(active.release)}, epoch {active.epoch}; before: {_id(active.previous_release) or 'none'}")


def _id(name: str) -> str:
    return name.rpartition("/")[2]


def _time(value: datetime | None) -> str:
    return f"{value:%Y-%m-%d %H:%M:%S}" if value else ""


def _map(release: Release) -> str:
    """The held-out mAP, whatever its L; empty when the release carries none."""
    found = next((value for name, value in sorted(release.metrics.items()) if name.split(".")[0] == "map"), None)
    return f"{found:.3f}" if found is not None else ""


def _sketches(release: Release) -> str:
    """What the release answers tier ESTIMATED from, in one line."""
    found = release.sketches
    if found is None:
        return "none: it does not serve tier ESTIMATED"
    fidelity = ", ".join(f"{name} {value:.4g}" for name, value in sorted(found.fidelity.items()))
    return f"{found.dimensions} dimensions of {found.selection}, from {found.teacher_id}; {fidelity or 'not measured'}"


def _refresh(release: Release) -> str:
    """Why and how it was made, in a few lines."""
    made = release.refresh
    if made is None:
        return "not made by a trainer"
    why = "; ".join(f"{what}: {detail}" if detail else what for what, detail in made.triggers) or "no reason recorded"
    tried = ", ".join(f"{start} {figure:.4g}" for start, figure in sorted(made.validation_map.items()))
    return (f"{why}\nhead: {made.start} (mAP on validation: {tried})\njudged by {made.held_out_queries} "
            f"{made.held_out_split} queries\nlabels {made.labels_digest[:16]}")


def _to_json(value: object) -> str:
    return json.dumps(value, indent=2, default=lambda v: v.isoformat() if isinstance(v, datetime) else dict(v))
