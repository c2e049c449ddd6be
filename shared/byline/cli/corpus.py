"""``byline corpus``: bring images in, look at them, withdraw them.

Why it exists: these are an operator's acts on the machine that holds the data. They need the database and
the blob store but no running gateway; a withdrawal is effective for every running service when it returns.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from byline.catalog.blobs import BlobStore
from byline.catalog.ingest import IngestReport, ingest
from byline.catalog.items import Item
from byline.catalog.store import CatalogStore
from byline.config import Settings, load_settings
from byline.db.session import make_engine
from byline.errors import InvalidRequest
from byline.telemetry import get_logger

app = typer.Typer(help="Ingest, list and withdraw corpus items.", no_args_is_help=True)
log = get_logger(__name__)

Corpus = Annotated[str | None, typer.Option("--corpus", help="Corpus id; default: the configured one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

#: Skipped entries named on the terminal; ``--skipped`` writes all of them to a file.
_SHOWN = 10


@app.command("ingest")
def ingest_corpus(
    source: Annotated[
        Path | None,
        typer.Argument(help="Parquet file, folder with a CSV or JSONL table, or WebDataset tar; default: the demo's."),
    ] = None,
    corpus: Corpus = None,
    skipped: Annotated[Path | None, typer.Option(help="Write every skipped entry and its reason to this CSV.")] = None,
) -> None:
    """Add images to a corpus. Running it again adds only what is new; broken images are skipped and listed."""
    settings = load_settings()
    engine = make_engine(settings.database_url)
    try:
        with _progress() as progress:
            report = ingest(
                engine, BlobStore(settings.blob_dir), source or settings.corpus_source,
                corpus or settings.corpus_id, progress,
            )  # fmt: skip
    finally:
        engine.dispose()
    if skipped is not None:
        _write_skipped(skipped, report)
    typer.echo(
        f"{report.corpus_id}: {report.added} added, {report.unchanged} there already, {len(report.skipped)} skipped"
    )
    for name, reason in report.skipped[:_SHOWN]:
        typer.echo(f"  skipped {name}: {reason}")
    if len(report.skipped) > _SHOWN:
        typer.echo(f"  … and {len(report.skipped) - _SHOWN} more; --skipped FILE writes all")


@app.command("list")
def list_items(
    corpus: Corpus = None,
    search: Annotated[str, typer.Option(help="Only items whose caption, keywords or creator contain this.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="Show at most so many items.")] = 20,
    as_json: AsJson = False,
) -> None:
    """The corpora in figures, and the items of one."""
    with _store() as (store, settings):
        summaries = store.corpora()
        wanted = search.lower()
        items = [
            item for item in store.items(corpus or settings.corpus_id)
            if wanted in " ".join((item.caption, item.creator, *item.keywords)).lower()
        ]  # fmt: skip
    if as_json:
        typer.echo(json.dumps([_values(item) for item in items[:limit]], indent=2))
        return
    console = Console()
    for summary in summaries:
        console.print(
            f"{summary.corpus_id}: {summary.items} items by {summary.creators} creators, {summary.withdrawn} withdrawn",
            highlight=False, markup=False,
        )  # fmt: skip
    table = Table("item", "caption", "creator", "licence")
    for item in items[:limit]:
        table.add_row(str(item.item_id), escape(item.caption), escape(item.creator), escape(item.licence))
    console.print(table)
    console.print(f"{min(limit, len(items))} of {len(items)} items", highlight=False)


@app.command("show")
def show_item(
    item_id: Annotated[int, typer.Argument(help="The item's id.")],
    image: Annotated[Path | None, typer.Option(help="Write its image to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Everything known of one item."""
    with _store() as (store, settings):
        item = store.by_ids([item_id]).get(item_id)
    if item is None:
        raise InvalidRequest("item_id", f"no item has the id {item_id}", item_id=item_id)
    if image is not None:
        image.write_bytes(BlobStore(settings.blob_dir).get(item.image_sha256))
    if as_json:
        typer.echo(json.dumps(_values(item), indent=2))
        return
    table = Table(show_header=False)
    for name, value in asdict(item).items():
        table.add_row(name, escape(", ".join(value) if isinstance(value, tuple) else str(value)))
    Console().print(table)


@app.command("withdraw")
def withdraw_items(
    item_ids: Annotated[list[int], typer.Argument(help="Ids of the items.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; there is no way back.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take items out of every answer from now on (a creator's opt-out). The receipt is printed."""
    if not yes:
        typer.confirm(f"Withdraw {len(item_ids)} item(s) for good?", abort=True)
    with _store() as (store, _settings):
        receipt = store.withdraw(item_ids, principal="cli")
    if as_json:
        ids = {name: [str(i) for i in getattr(receipt, name)] for name in ("withdrawn", "already", "unknown")}
        typer.echo(json.dumps({"at": receipt.at.isoformat(), **ids}, indent=2))
        return
    typer.echo(f"{receipt.at:%Y-%m-%d %H:%M:%S %Z}: {len(receipt.withdrawn)} withdrawn, "
               f"{len(receipt.already)} withdrawn before, {len(receipt.unknown)} unknown")  # fmt: skip
    for item_id in receipt.unknown:
        typer.echo(f"  unknown: {item_id}")


@contextmanager
def _store() -> Iterator[tuple[CatalogStore, Settings]]:
    settings = load_settings()
    engine = make_engine(settings.database_url)
    try:
        yield CatalogStore(engine), settings
    finally:
        engine.dispose()


@contextmanager
def _progress() -> Iterator[_Reporter]:
    """A bar on a terminal; elsewhere one log line a tenth of the way."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield _Reporter(bar)


class _Reporter:
    """Receives (done, total) from the ingest."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("ingest", total=None)
        self._logged = 0

    def __call__(self, done: int, total: int | None) -> None:
        self._bar.update(self._task, completed=done, total=total)
        if self._bar.disable and done - self._logged >= max((total or 0) // 10, 1000):
            self._logged = done
            log.info("ingest_progress", done=done, total=total)


def _values(item: Item) -> dict[str, object]:
    """For JSON, whose numbers do not hold 63 bits: ids are strings."""
    return {**asdict(item), "item_id": str(item.item_id), "near_duplicate_group": str(item.near_duplicate_group)}


def _write_skipped(path: Path, report: IngestReport) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "reason"])
        writer.writerows(report.skipped)
