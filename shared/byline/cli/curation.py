"""``byline curation``: what labelling may spend, and its pause.

Why it exists: the teacher's hours are the most expensive thing Byline uses; whoever pays for them sees and sets here
what they go to, and what is set holds at once and after every restart.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from byline.cli.operator import Address, AsJson, line, say
from byline.client.connection import client_options
from byline.client.curation import Curation, CurationClient
from byline.config import load_settings
from byline.errors import InvalidRequest

app = typer.Typer(help="What labelling may spend: status, pause, resume, budget.", no_args_is_help=True)

Model = Annotated[str | None, typer.Option("--model", help="Model id; default: the configured one.")]


def open_curation(address: str | None, model: str | None) -> tuple[CurationClient, str]:
    """A client of the running gateway, or of the one named, and the model's id."""
    settings = load_settings()
    client = CurationClient(address or settings.grpc_address, settings.project_id, **client_options(settings))
    return client, model or settings.model_id


@app.command("status")
def status(model: Model = None, address: Address = None, as_json: AsJson = False) -> None:
    """Whether curation runs, what it may spend and what it has spent."""
    client, model_id = open_curation(address, model)
    with client:
        _print(client.curation(model_id), as_json)


@app.command("pause")
def pause(
    reason: Annotated[str, typer.Option(help="Why, for whoever finds it paused.")] = "",
    model: Model = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Stop at once: nothing is chosen and no ranking begun until resumed, also after a restart."""
    client, model_id = open_curation(address, model)
    with client:
        _print(client.pause_curation(model_id, reason), as_json)


@app.command("resume")
def resume(model: Model = None, address: Address = None, as_json: AsJson = False) -> None:
    """End a pause."""
    client, model_id = open_curation(address, model)
    with client:
        _print(client.resume_curation(model_id), as_json)


@app.command("budget")
def budget(
    queries_per_hour: Annotated[float | None, typer.Option(min=0.0, help="Queries labelled in an hour.")] = None,
    gpu_share: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Of the workers' time.")] = None,
    uniform_share: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Of queries, by chance alone.")] = None,
    repeat_share: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Of labels, made twice.")] = None,
    drift_share: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Of opted-in lookups.")] = None,
    reset: Annotated[list[str] | None, typer.Option(help="Name of a figure that goes back to its default.")] = None,
    model: Model = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Change figures of the budget; what is not named stays as it is."""
    given = {"queries_per_hour": queries_per_hour, "gpu_share": gpu_share, "uniform_share": uniform_share,
             "repeat_share": repeat_share, "drift_share": drift_share}
    changes = {name: value for name, value in given.items() if value is not None}
    again = [name.replace("-", "_") for name in reset or ()]
    if not changes and not again:
        raise InvalidRequest("budget", "names no figure: see `byline curation budget --help`, or `curation status`")
    client, model_id = open_curation(address, model)
    with client:
        _print(client.set_budget(model_id, changes, again), as_json)


def _print(found: Curation, as_json: bool) -> None:
    if as_json:
        return say(asdict(found))
    rate = "no limit" if found.queries_per_hour is None else f"{found.queries_per_hour:g}"
    busy = found.window_worker_s / (found.window_s * max(found.workers, 1))
    line(f"{found.model}: {'paused' if found.paused else 'running'}{f' ({found.reason})' if found.reason else ''}")
    line(f"queries an hour: {rate}; {found.window_queries} in the last {found.window_s / 60:.0f} minutes")
    line(f"workers' time: at most {found.gpu_share:.0%}; {busy:.0%} of {found.workers} worker(s) was used")
    line(f"by chance {found.uniform_share:.0%}, repeated {found.repeat_share:.0%}, live lookups checked "
         f"{found.drift_share:.1%}")
    if found.max_rankings and found.rankings >= found.max_rankings:
        line(f"rankings: {found.rankings} of at most {found.max_rankings}: NOTHING IS ASKED until "
             "BYLINE_CURATION_MAX_RANKINGS is raised (0: no limit)")
    else:
        line(f"rankings: {found.rankings}{f' of at most {found.max_rankings}' if found.max_rankings else ''}")
    line(f"ranking jobs open: {found.open_jobs}; live samples waiting: {found.waiting_samples}")
    return None
