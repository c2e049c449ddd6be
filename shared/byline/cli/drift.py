"""``byline drift``: how student and teacher agree over time, on what clients ask.

Why it exists: the figure an ML engineer looks at every morning, by window and prompt cluster, with its uncertainty.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from byline.cli.curation import Model, open_curation
from byline.cli.operator import Address, AsJson, line, say
from byline.client.curation import Drift, Estimate


def drift(
    hours: Annotated[float, typer.Option(min=0.02, help="Length of a window.")] = 24.0,
    windows: Annotated[int, typer.Option(min=1, max=400, help="How many windows back.")] = 14,
    curated: Annotated[bool, typer.Option("--curated", help="Curation's uniform queries, not live ones.")] = False,
    close: Annotated[int | None, typer.Option(help="Close the alarm with this id instead.")] = None,
    reason: Annotated[str, typer.Option(help="Why it is closed.")] = "",
    model: Model = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Agreement of student and teacher by time window and prompt cluster, with 95 % intervals, and alarms."""
    client, model_id = open_curation(address, model)
    with client:
        if close is not None:
            alarm = client.close_alarm(model_id, close, reason)
            return say(asdict(alarm)) if as_json else line(f"alarm {alarm.id} is closed by {alarm.closed_by}")
        found = client.drift(model_id, timedelta(hours=hours), windows, curated=curated)
    if as_json:
        return say(asdict(found))
    return _print(found)


def estimate(found: Estimate, digits: int = 3) -> str:
    """``0.812 (0.775 to 0.849)``; as much of it as is known."""
    if found.value is None:
        return "–"
    if found.low is None or found.high is None:
        return f"{found.value:.{digits}f}"
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def _print(found: Drift) -> None:
    if not found.windows:
        line("nothing measured yet: a share of the lookups whose clients opted in goes to the teacher "
             "(`byline submit --labelling-consent`, `byline curation status`)")
    else:
        table = Table("window from", "prompts", "queries", "overlap", "Spearman", "said less true", box=None)
        for one in found.windows:
            example = "all" if one.cluster is None else f"{one.cluster}: {found.examples[one.cluster][:30]}"
            table.add_row(f"{one.start:%Y-%m-%d %H:%M}", escape(example), str(one.queries), estimate(one.overlap),
                          estimate(one.spearman), estimate(one.calibration))
        Console().print(table)
    for alarm in found.alarms:
        state = "open" if alarm.closed is None else f"closed {alarm.closed:%Y-%m-%d %H:%M} by {alarm.closed_by}"
        line(f"alarm {alarm.id}, {alarm.raised:%Y-%m-%d %H:%M}, {state}: {alarm.reason}")
