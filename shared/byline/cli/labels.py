"""``byline labels``: bring rankings in from a snapshot, write one, count them.

Why it exists: a fresh machine gets useful labels in a second instead of an hour, and what an hour of teacher's work
gave on one machine reaches the repository by one documented command.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from byline.catalog.blobs import BlobStore
from byline.catalog.store import CatalogStore
from byline.cli.operator import say
from byline.config import load_settings
from byline.db.session import make_engine
from byline.errors import InvalidRequest
from byline.rankings.snapshot import SnapshotHeader, export_snapshot, import_snapshot
from byline.rankings.store import RankingStore

app = typer.Typer(help="Import, export and count rankings.", no_args_is_help=True)

Model = Annotated[str | None, typer.Option("--model", help="Model id; default: the configured one.")]


@app.command("import")
def import_labels(
    path: Annotated[Path | None, typer.Argument(help="Snapshot folder; default: the one in the repository.")] = None,
    model: Model = None,
) -> None:
    """Add the rankings of a snapshot. Running it again adds nothing."""
    settings = load_settings()
    source = path or settings.labels_dir
    engine = make_engine(settings.database_url)
    try:
        record = CatalogStore(engine).model(model or settings.model_id)
        report = import_snapshot(engine, BlobStore(settings.blob_dir), source, model_id=record.model_id,
                                 model_revision=record.revision, corpus_id=record.corpus_id)
    finally:
        engine.dispose()
    typer.echo(f"{report.rankings} rankings and {report.queries} queries added, {report.present} were there already")


@app.command("export")
def export_labels(
    path: Annotated[Path, typer.Argument(help="Folder to write; existing snapshot files in it are replaced.")],
    teacher: Annotated[str | None, typer.Option("--teacher", help="Teacher id; needed if there are several.")] = None,
    model: Model = None,
    made_by: Annotated[str, typer.Option("--made-by", help="The command that made these labels.")] = "",
) -> None:
    """Write all rankings of one teacher into a folder: labels.json and labels.safetensors."""
    settings = load_settings()
    engine = make_engine(settings.database_url)
    try:
        record = CatalogStore(engine).model(model or settings.model_id)
        teachers = RankingStore(engine).teachers(record.model_id)
        if teacher is None and len(teachers) != 1:
            raise InvalidRequest("teacher", f"name one of: {', '.join(teachers) or '(there are no rankings)'}")
        header = SnapshotHeader(model_id=record.model_id, model_revision=record.revision, corpus_id=record.corpus_id,
                                teacher_id=teacher or next(iter(teachers)), made_by=made_by)
        count = export_snapshot(engine, BlobStore(settings.blob_dir), path, header)
    finally:
        engine.dispose()
    size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    typer.echo(f"{count} rankings written to {path} ({size:.1f} MB)")


@app.command("stats")
def stats(model: Model = None, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Queries with rankings per teacher and split."""
    settings = load_settings()
    engine = make_engine(settings.database_url)
    try:
        store = RankingStore(engine)
        model_id = model or settings.model_id
        counts = {teacher: store.counts(model_id, teacher) for teacher in store.teachers(model_id)}
    finally:
        engine.dispose()
    if as_json:
        return say({"model": model_id, "rankings": {teacher: dict(splits) for teacher, splits in counts.items()}})
    table = Table("teacher", "train", "validation", "test", title=f"Ranked queries of {model_id}", title_justify="left")
    for teacher, splits in counts.items():
        table.add_row(teacher, *(str(splits[split]) for split in ("train", "validation", "test")))
    Console().print(table)
    return None


@app.command("quality")
def quality(
    model: Model = None,
    address: Annotated[str | None, typer.Option(help="host:port of the gateway (BYLINE_GRPC_ADDRESS).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How many labels there are, how reliable they are, and what their shortlists miss; asks the gateway."""
    from byline.cli.curation import open_curation
    from byline.cli.drift import estimate

    client, model_id = open_curation(address, model)
    with client:
        found = client.label_statistics(model_id)
    if as_json:
        return say(asdict(found))
    table = Table("", "", box=None, show_header=False)
    for name in ("by_split", "by_source", "by_purpose", "by_teacher"):
        values: dict[str, int] = dict(getattr(found, name))
        table.add_row(name.replace("_", " "), ", ".join(f"{key} {count}" for key, count in sorted(values.items())))
    table.add_row("repeated labels", f"{found.repeat_overlap.queries}: overlap@20 {estimate(found.repeat_overlap)}, "
                  f"Spearman {estimate(found.repeat_spearman)}")
    table.add_row("pruning loss", f"{estimate(found.pruning_loss)} of the teacher's top at most "
                  f"({found.pruning_loss.queries} queries)")
    table.add_row("", f"{estimate(found.missed_items, 1)} items outside the shortlists beat its last inside")
    Console().print(table)
    return None
