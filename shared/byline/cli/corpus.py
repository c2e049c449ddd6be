"""``byline corpus``: bring images in, look at them, withdraw them.

Why it exists: these are an operator's acts on the machine that holds the data. They need the database and
the blob store but no running gateway; a withdrawal is effective for every running service when it returns.
"""

from __future__ import annotations

import csv
import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from byline.catalog.blobs import BlobStore
from byline.catalog.ingest import IngestReport, ingest
from byline.catalog.items import Item
from byline.catalog.sources import Broken, Candidate, creator_of, open_source
from byline.catalog.store import CatalogStore
from byline.catalog.withdrawals import Criterion, StoredReceipt
from byline.client.connection import client_options
from byline.client.corpus import CorpusClient, NewItem
from byline.config import Settings, load_settings
from byline.db.session import make_engine
from byline.errors import InvalidRequest
from byline.security.signing import Keyring
from byline.telemetry import get_logger

if TYPE_CHECKING:
    from byline.releases.absence import AbsenceReport
    from byline.releases.purge import Places

app = typer.Typer(help="Ingest, add, list and withdraw corpus items; receipts.", no_args_is_help=True)
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


@app.command("add")
def add_items(
    source: Annotated[
        Path, typer.Argument(help="Parquet file, folder with a CSV or JSONL table, or WebDataset tar.")
    ],
    corpus: Corpus = None,
    address: Annotated[str | None, typer.Option(help="host:port of the gateway (BYLINE_GRPC_ADDRESS).")] = None,
    wait: Annotated[bool, typer.Option(help="Return only when they are found.")] = True,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for that.")] = 120.0,
    as_json: AsJson = False,
) -> None:
    """Add items to a running system: found within seconds, in the next release for good. Repeating it is harmless."""
    settings = load_settings()
    name = corpus or settings.corpus_id
    broken: list[tuple[str, str]] = []
    client = CorpusClient(address or settings.grpc_address, settings.project_id, **client_options(settings))
    begun = time.monotonic()
    with client:
        added = client.add_items(name, new_items(open_source(source).entries, broken))
        stored_s = time.monotonic() - begun
        found = client.wait_until_found(name, added.corpus_sequence, timeout) if wait else None
    found_s = time.monotonic() - begun
    refused = [(str(one.item_id or ""), one.reason) for one in added.items if one.outcome == "REFUSED"]
    if as_json:
        typer.echo(json.dumps({
            "corpus": name, "added": added.count("ADDED"), "unchanged": added.count("UNCHANGED"),
            "refused": [*broken, *refused], "corpus_sequence": added.corpus_sequence,
            "stored_seconds": round(stored_s, 3), "found_seconds": round(found_s, 3) if found else None,
        }, indent=2))  # fmt: skip
        return
    typer.echo(f"{name}: {added.count('ADDED')} added, {added.count('UNCHANGED')} there already, "
               f"{len(refused) + len(broken)} refused; stored in {stored_s:.1f} s"
               + (f", found after {found_s:.1f} s" if found else ""))  # fmt: skip
    for entry, reason in [*broken, *refused][:_SHOWN]:
        typer.echo(f"  refused {entry}: {reason}")


def new_items(entries: Iterator[Candidate | Broken], broken: list[tuple[str, str]]) -> Iterator[NewItem]:
    """The entries of a source as items to add; those that cannot be read are noted in ``broken``."""
    for entry in entries:
        if isinstance(entry, Broken):
            broken.append((entry.name, entry.reason))
            continue
        fields = entry.fields
        text = {name: str(fields.get(name) or "") for name in ("licence", "license", "source", "source_path")}
        words = fields.get("keywords") or ()
        yield NewItem(
            entry.image, entry.caption, creator_of(fields), text["licence"] or text["license"], text["source"],
            text["source_path"] or entry.name, tuple(words if not isinstance(words, str) else words.split(",")),
            int(fields.get("item_id") or 0),
        )


@app.command("withdraw")
def withdraw_items(
    item_ids: Annotated[list[int] | None, typer.Argument(help="Ids of the items.")] = None,
    creator: Annotated[str, typer.Option(help="All items of this creator, and whatever comes later.")] = "",
    licence: Annotated[str, typer.Option(help="All items under this licence, and whatever comes later.")] = "",
    corpus: Corpus = None,
    reason: Annotated[str, typer.Option(help="Why, for the receipt.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; there is no way back.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take items out of every answer from now on (a creator's opt-out). The receipt is kept, and printed."""
    criterion = Criterion(tuple(item_ids or ()), creator, licence)
    if not yes:
        what = f"{len(criterion.item_ids)} item(s)" if criterion.item_ids else f"all items of {creator or licence}"
        typer.confirm(f"Withdraw {what} for good?", abort=True)
    with _store() as (store, settings):
        receipt = store.withdraw_matching(corpus or settings.corpus_id, criterion, principal="cli", reason=reason)
    if as_json:
        ids = {name: [str(i) for i in getattr(receipt, name)] for name in ("withdrawn", "already", "unknown")}
        kept = {"receipts": [str(one) for one in receipt.receipts]}
        typer.echo(json.dumps({"at": receipt.at.isoformat(), **ids, **kept}, indent=2))
        return
    typer.echo(f"{receipt.at:%Y-%m-%d %H:%M:%S %Z}: {len(receipt.withdrawn)} withdrawn, "
               f"{len(receipt.already)} withdrawn before, {len(receipt.unknown)} unknown")  # fmt: skip
    for item_id in receipt.unknown:
        typer.echo(f"  unknown: {item_id}")
    for receipt_id in receipt.receipts:
        typer.echo(f"  receipt {receipt_id} (byline corpus receipt {receipt_id} --verify)")


@app.command("receipt")
def show_receipt(
    receipt_id: Annotated[uuid.UUID, typer.Argument(help="The receipt's id.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every place where the items could be.")] = False,
    as_json: AsJson = False,
) -> None:
    """What was withdrawn and what was removed; with --verify whether it is really gone (exit code 1 if not)."""
    from byline.releases.absence import check_absence

    settings = load_settings()
    engine = make_engine(settings.database_url)
    try:
        receipt = CatalogStore(engine).receipt(receipt_id)
        found = check_absence(engine, _places(settings), receipt) if verify else None
    finally:
        engine.dispose()
    if as_json:
        values = {**asdict(receipt), "images": {str(k): v for k, v in receipt.images.items()},
                  "already": [str(i) for i in sorted(receipt.already)], "absence": found.to_json() if found else None}
        typer.echo(json.dumps(values, indent=2, default=str))
    else:
        _print_receipt(receipt, found)
    if found is not None and not found.absent:
        raise typer.Exit(1)


@app.command("purge")
def purge_files(corpus: Corpus = None, as_json: AsJson = False) -> None:
    """Remove withdrawn items from all files now, if no release that answers holds them. The trainer does it, too."""
    from byline.releases.purge import purge

    settings = load_settings()
    engine = make_engine(settings.database_url)
    try:
        report = purge(engine, _places(settings), corpus or settings.corpus_id)
    finally:
        engine.dispose()
    if as_json:
        typer.echo(json.dumps({"done": report.done, "receipts": report.receipts, **report.to_json()}, indent=2))
        return
    typer.echo(f"{report.receipts} open receipts, {report.items} items: " + ("purged" if report.done else "not yet"))
    for model, release in report.waiting.items():
        typer.echo(f"  {model} still answers from {release}: refresh first (byline releases refresh)")
    for release in report.left:
        typer.echo(f"  {release} holds them and is in use: purge again later")


def _print_receipt(receipt: StoredReceipt, found: AbsenceReport | None) -> None:
    typer.echo(f"{receipt.receipt_id}: {len(receipt.images)} items of corpus {receipt.corpus_id}, withdrawn "
               f"{receipt.at:%Y-%m-%d %H:%M:%S %Z} by {receipt.principal}")  # fmt: skip
    if receipt.reason:
        typer.echo(f"  reason: {receipt.reason}")
    if receipt.purged_at is None:
        typer.echo("  in no answer; the files follow with the next release")
    else:
        typer.echo(f"  removed from all files {receipt.purged_at:%Y-%m-%d %H:%M:%S %Z}")
        for model, release in receipt.purged.get("absent_from", ()):
            typer.echo(f"  absent from {model} {release}")
    if found is None:
        return
    for place, counts in (
        ("rows", found.rows), ("features", found.features), ("sketches", found.sketches), ("files", found.files),
        *((f"release {name}", parts) for name, parts in found.releases.items()),
    ):  # fmt: skip
        named = {name: count for name, count in counts.items() if count}
        typer.echo(f"  {place}: " + (f"FOUND {named}" if named else f"none ({len(counts)} looked at)"))
    typer.echo(f"  images: {found.images} found, {found.kept_images} kept because something else is the same picture")
    typer.echo("  absent everywhere" if found.absent else "  NOT absent")


def _places(settings: Settings) -> Places:
    from byline.releases.purge import Places

    keyring = Keyring.parse(settings.signing_key)
    return Places(settings.release_dir, settings.cache_dir, BlobStore(settings.blob_dir), keyring)


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
