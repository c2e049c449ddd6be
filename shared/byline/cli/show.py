"""``byline show``: a job's answer as a table, a web page or JSON.

Why it exists: people look at pictures, programs at JSON; both get the same answer with its tier, release and
units, and never a number without saying how it was found.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from byline.client import Answer, Client, Job, Probability
from byline.client.connection import client_options
from byline.config import load_settings
from byline.errors import BlobNotFound, ItemNotFound

#: What the figure called score is, in words for people. It is the field ``cosine`` of the API.
SCORE = "score: inner product of the student's embeddings, may exceed 1; compare it within one release only"


def show(
    job: Annotated[str, typer.Argument(help="Id or name of the job.")],
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page with pictures to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    address: Annotated[str | None, typer.Option(help="host:port of the gateway (BYLINE_GRPC_ADDRESS).")] = None,
    project: Annotated[str | None, typer.Option(help="Project (BYLINE_PROJECT_ID).")] = None,
) -> None:
    """Show a job's answer: table, HTML page or JSON."""
    settings = load_settings()
    with Client(
        address or settings.grpc_address, project or settings.project_id, **client_options(settings)
    ) as client:
        found = client.get(job)
        if html is not None:
            from byline.cli.page import write_page

            write_page(html, found, *pictures(client, found))
            typer.echo(f"wrote {html}")
            if not as_json:
                return
        print_job(found, as_json=as_json)


def print_job(job: Job, *, as_json: bool) -> None:
    """Print a job to standard output."""
    if as_json:
        typer.echo(to_json(job))
        return
    console = Console()
    if job.error is not None:
        failure = escape(f"{job.error.reason}: {job.error.message}")
        console.print(f"[red]{job.state}[/red] {failure}", highlight=False)
    elif job.answer is None:
        console.print(f"{job.state}: no answer yet", highlight=False)
    if job.verification_error is not None:
        problem = job.verification_error
        console.print(
            f"[yellow]not verified[/yellow] {escape(f'{problem.reason}: {problem.message}')}", highlight=False
        )
    if job.answer is not None:
        console.print(table(job, job.answer))


def table(job: Job, answer: Answer) -> Table:
    """The answer as a table for the terminal."""
    title = f"{answer.tier} · {escape(job.prompt or 'no prompt')} · release {answer.release.rpartition('/')[2]}"
    caption = verdict_line(answer)
    found = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    verified = any(influence.tau is not None for influence in answer.influences)
    calibrated = probability_name(answer)
    found.add_column("#", justify="right")
    if verified:
        found.add_column("was", justify="right")
    found.add_column("source")
    found.add_column("artist")
    found.add_column("licence")
    found.add_column("score", justify="right")
    if verified:
        found.add_column("influence τ", justify="right")
    if calibrated is not None:
        found.add_column(calibrated, justify="right")
    found.add_column("item", justify="right")
    for one in answer.influences:
        cells = [str(one.rank)]
        if verified:
            cells.append("–" if one.retrieved_rank is None else str(one.retrieved_rank))
        cells += [
            escape(one.caption),
            escape(one.creator or "unknown"),
            escape(one.licence),
            _number(one.cosine, ".3f"),
        ]
        if verified:
            cells.append(with_error(one.tau, one.standard_error))
        if calibrated is not None:
            cells.append(with_interval(one.probability))
        found.add_row(*cells, str(one.item_id))
    return found


def verdict_line(answer: Answer) -> str:
    """What must be said about the answer as a whole, in one line."""
    parts = []
    if answer.not_attributable:
        parts.append(f"NOT ATTRIBUTABLE: {refusal(answer)}; these only came nearest")
    if answer.far_from_labelled and answer.tier != "VERIFIED":
        parts.append("FAR from every query the student has learnt from: have it verified if it matters")
    if answer.tier == "RETRIEVED":
        parts.append("predicted by the student, not verified")
    elif answer.tier == "ESTIMATED":
        parts.append(
            f"estimated from sketches of the whole corpus by {answer.teacher_id or 'the teacher'}, "
            f"{answer.draws} draws of the query's gradient, whose noise alone ± shows"
        )
    elif answer.tier == "VERIFIED":
        parts.append(f"scored by {answer.teacher_id or 'the teacher'}, {answer.draws} draws")
    if any(influence.cosine is not None for influence in answer.influences):
        parts.append(SCORE)
    if (named := probability_name(answer)) is not None:
        coverage = next(one.probability.coverage for one in answer.influences if one.probability is not None)
        parts.append(f"{named}: how likely the teacher puts it there, with an interval that holds {coverage:.0%}")
    if answer.withdrawn_influences:
        parts.append(f"{answer.withdrawn_influences} withdrawn since")
    if "total" in answer.timings_ms:
        parts.append(f"{answer.timings_ms['total']:.1f} ms in the worker")
    return " · ".join(parts)


def refusal(answer: Answer) -> str:
    """Why an answer attributes nothing."""
    found, needed = answer.evidence, answer.evidence_floor
    if found is not None and needed is not None and found < needed:
        return f"the model seems not to have made this image from this prompt (evidence {found:.3f} of {needed:.3f})"
    floor = "" if answer.noise_floor is None else f" ({answer.noise_floor:.3g})"
    return f"nothing rises above the noise floor{floor}"


def probability_name(answer: Answer) -> str | None:
    """What the probabilities of an answer are of; None if it has none."""
    for one in answer.influences:
        if one.probability is not None:
            return f"P(top {one.probability.top})" if one.probability.top else "P(top)"
    return None


def with_interval(probability: Probability | None) -> str:
    """A probability with its interval; empty if there is none."""
    return "" if probability is None else f"{probability.value:.2f} ({probability.low:.2f}–{probability.high:.2f})"


def with_error(value: float | None, error: float | None) -> str:
    """A number with its standard error; empty if there is none."""
    if value is None:
        return ""
    return _number(value, ".3g") if error is None else f"{value:.3g} ± {error:.1g}"


def pictures(client: Client, job: Job) -> tuple[bytes | None, dict[int, bytes]]:
    """The query image and the images of all items named; what cannot be had any more is left out."""
    items: dict[int, bytes] = {}
    for answer in job.answers:
        for influence in answer.influences:
            if influence.item_id in items:
                continue
            try:
                items[influence.item_id] = client.item_image(influence.name)
            except (ItemNotFound, BlobNotFound):
                continue
    try:
        return client.query_image(job), items
    except BlobNotFound:
        return None, items


def to_json(job: Job) -> str:
    """A job as JSON; ids are strings because JSON has no 64-bit integer."""
    return json.dumps(_plain(asdict(job)), indent=2, ensure_ascii=False)


def _plain(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _plain(v, k) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, key) for v in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if key in ("item_id", "item_ids", "near_duplicate_group"):
        return str(value)
    return value


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)
