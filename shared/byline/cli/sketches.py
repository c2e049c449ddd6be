"""``byline sketches``: fit the sketches that estimated answers come from, and show what there is.

Why it exists: fitting is one pass of gradients over the corpus, minutes to hours, that nobody wants to start by
asking a question; it is a command of its own that resumes, and its result is put into every release from then on.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sqlalchemy import Engine, select

from byline.catalog.blobs import BlobStore
from byline.catalog.decode import decode_image
from byline.catalog.store import CatalogStore, ModelRecord
from byline.config import LAYER_SELECTIONS, Settings, load_settings
from byline.db.models import Base
from byline.db.session import make_engine, transaction
from byline.errors import InvalidRequest, TeacherNotUsable

if TYPE_CHECKING:
    from byline.teachers import TeacherItem, TeacherQuery
    from byline.teachers.files import TeacherFiles
    from byline.teachers.first_order import AbuPlusLinear
    from byline.teachers.sketch_set import SketchSet

app = typer.Typer(help="Fit and show the sketches behind estimated answers.", no_args_is_help=True)
console = Console(stderr=True)

#: Seconds between two lines of progress where there is no terminal.
LINE_EVERY_S = 10.0
_QUERIES = Base.metadata.tables["queries"]
Layers = Annotated[str | None, typer.Option("--layers", help=" | ".join(LAYER_SELECTIONS))]


@app.command("fit")
def fit(
    layers: Layers = None,
    dimensions: Annotated[int, typer.Option(min=1, help="Numbers of a sketch.")] = 512,
    coordinates: Annotated[int, typer.Option(min=1, help="Entries of a whitened gradient that are kept.")] = 16_384,
    queries: Annotated[int, typer.Option(min=0, help="Stored queries the fidelity is measured with.")] = 20,
    draws: Annotated[int | None, typer.Option(min=8, help="Noise draws per item; default: curation's.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Fit anew even where there are sketches.")] = False,
) -> None:
    """Fit sketches of the configured model and corpus into the cache; run again, a killed fit goes on.

    Curvature of the layers is fitted first where the model came without. The next release carries the sketches.
    """
    from byline.teachers.files import SKETCHES, TeacherFiles

    settings = load_settings()
    selection = _selection(layers or settings.curation_selection)
    engine = make_engine(settings.database_url)
    try:
        record = CatalogStore(engine).model(settings.model_id)
        files = TeacherFiles.beside(record.directory, settings.cache_dir, record.revision)
        name = f"{SKETCHES}-{selection}"
        if again:
            for old in (name, "gradient"):
                shutil.rmtree(files.target(old), ignore_errors=True)
        elif (there := files.find(name, record.revision)) is not None:
            typer.echo(f"there are sketches in {there} already; --again fits them anew")
            return
        items = _items(engine, settings, record)
        asked = _stored_queries(engine, settings, record, queries)
        if not asked:
            console.print("no queries are stored: how near the sketches come to the teacher will not be measured")
        # Withdrawn items count: the model was trained on them, and the step 1/N must not move with an opt-out.
        corpus_size = len(CatalogStore(engine).items(record.corpus_id, include_withdrawn=True))
        teacher = _teacher(settings, record, files, selection, draws or settings.curation_draws, items, corpus_size)
    finally:
        engine.dispose()
    from byline.features.gradient import fit_gradient_feature
    from byline.teachers.gradient_basis import FOLDER
    from byline.teachers.sketch_fit import fit_sketches

    # What a killed fit left is of these items, queries and settings only.
    work = [teacher.teacher_id, str(dimensions), str(coordinates), *(f"{one.item_id} {one.caption}" for one in items)]
    work += [f"{query.prompt} {hashlib.sha256(query.image.tobytes()).hexdigest()}" for query in asked]
    unfinished = f"{name}-{hashlib.sha256(chr(0).join(work).encode()).hexdigest()[:12]}"
    with _bar("gradients of items") as progress:
        fitted = fit_sketches(
            teacher, items, dimensions=dimensions, coordinates=coordinates, fidelity_queries=asked,
            store=files.scratch(unfinished), seed=settings.seed, progress=progress,
        )  # fmt: skip
    with files.publishing(name, record.revision) as directory:
        fitted.save(directory)
    files.clear_scratch(unfinished)
    typer.echo(f"{files.target(name)}: {_said(fitted)}")
    if fitted.tokens is None or (not again and files.find(FOLDER, record.revision) is not None):
        return
    truth = fitted.tokens.scores(fitted.tokens.basis.directions(teacher.directions(asked))) if asked else None
    with _bar("basis of the gradient feature") as progress, files.publishing(FOLDER, record.revision) as directory:
        fidelity = fit_gradient_feature(
            teacher, fitted.tokens, asked, truth, directory, seed=settings.seed, progress=progress
        )
    shown = ", ".join(f"{key} {value:.4f}" for key, value in fidelity.items()) or "not measured"
    typer.echo(f"{files.target(FOLDER)}: encoder gradient; against the teacher's own ranking: {shown}")


@app.command("show")
def show(layers: Layers = None) -> None:
    """The sketches the next release will carry, and how near they come to their teacher."""
    from byline.teachers.files import SKETCHES, TeacherFiles
    from byline.teachers.sketch_set import SketchSet

    settings = load_settings()
    selection = _selection(layers or settings.curation_selection)
    engine = make_engine(settings.database_url)
    try:
        record = CatalogStore(engine).model(settings.model_id)
        known = {item.item_id for item in CatalogStore(engine).items(record.corpus_id)}
    finally:
        engine.dispose()
    files = TeacherFiles.beside(record.directory, settings.cache_dir, record.revision)
    places = [files.find(name, record.revision) for name in (f"{SKETCHES}-{selection}", SKETCHES)]
    place = next((found for found in places if found is not None), None)
    if place is None:
        typer.echo(f"model {record.model_id} has no sketches: `byline sketches fit` fits them")
        raise typer.Exit(1)
    found = SketchSet.load(place, record.revision)
    later = len(known - set(found.item_ids.tolist()))
    typer.echo(f"{place}: {_said(found)}; {later} items of the corpus came later")


def _selection(name: str) -> str:
    if name not in LAYER_SELECTIONS:
        raise InvalidRequest("layers", f"{name!r} is unknown; choose one of {', '.join(LAYER_SELECTIONS)}")
    return name


def _items(engine: Engine, settings: Settings, record: ModelRecord) -> list[TeacherItem]:
    """The corpus with its pictures. Withdrawn items are not among them."""
    from byline.teachers import TeacherItem

    blobs = BlobStore(settings.blob_dir)
    items = CatalogStore(engine).items(record.corpus_id)
    if not items:
        raise TeacherNotUsable(f"corpus {record.corpus_id} holds no items: ingest it first (`byline corpus ingest`)")
    return [TeacherItem(one.item_id, decode_image(blobs.get(one.image_sha256)), one.caption) for one in items]


def _stored_queries(engine: Engine, settings: Settings, record: ModelRecord, count: int) -> list[TeacherQuery]:
    """Up to ``count`` stored queries of the model, held-out ones first."""
    from byline.teachers import TeacherQuery

    order = (_QUERIES.c.split != "test", _QUERIES.c.prompt, _QUERIES.c.seed)
    statement = select(_QUERIES).where(_QUERIES.c.model_id == record.model_id).order_by(*order).limit(count)
    blobs = BlobStore(settings.blob_dir)
    with transaction(engine) as connection:
        rows = connection.execute(statement).mappings().all()
    return [TeacherQuery(decode_image(blobs.get(row["image_sha256"])), row["prompt"]) for row in rows]


def _teacher(
    settings: Settings, record: ModelRecord, files: TeacherFiles, selection: str, draws: int,
    items: Sequence[TeacherItem], corpus_size: int,
) -> AbuPlusLinear:  # fmt: skip
    """The first-order teacher whose gradients are sketched: curation's settings, the tier's draws of a query."""
    import torch

    from byline.diffusion.model import DiffusionModel
    from byline.teachers.first_order import AbuPlusLinear
    from byline.teachers.natural_gradient import UnlearningSettings
    from byline.teachers.recipes import Fitting
    from byline.teachers.registry import load_ready_teacher

    torch.set_num_threads(settings.torch_threads)
    model = DiffusionModel.load(record.directory, settings.device)
    if model.revision != record.revision:
        raise TeacherNotUsable(
            f"{record.directory} holds revision {model.revision} of the model, registered is {record.revision}"
        )
    asked = {name: value for name, value in settings.curation_teacher_settings.items() if name != "selection"}
    wanted = UnlearningSettings(
        corpus_size=corpus_size, query_draws=settings.estimate_draws, item_draws=draws, seed=settings.seed,
        **asked,  # type: ignore[arg-type]
    )  # fmt: skip
    with _bar("curvature") as progress:
        teacher = load_ready_teacher(
            "abu_plus_linear", model, files, wanted, lambda: items, selection=selection,
            fitting=Fitting(seed=settings.seed), progress=progress,
        )  # fmt: skip
    if not isinstance(teacher, AbuPlusLinear):
        raise TeacherNotUsable("abu_plus_linear is not the teacher sketches are made by")
    return teacher


@contextmanager
def _bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress callback: a bar with the time left on a terminal, a line now and then elsewhere."""
    if not sys.stderr.isatty():
        yield _Lines(label)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as shown:
        task = shown.add_task(label, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


class _Lines:
    """Progress where there is no terminal: a line now and then."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._said_at = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._said_at >= LINE_EVERY_S:
            self._said_at = now
            console.print(f"{self._label}: {done} of {total}", highlight=False)


def _said(found: SketchSet) -> str:
    """A sketch set in one line."""
    fidelity = ", ".join(
        f"{name} {found.fidelity[name]:.4f}" for name in ("map100", "map20", "spearman") if name in found.fidelity
    )
    queries = int(found.fidelity.get("queries", 0))
    return (
        f"{len(found.item_ids)} items in {found.basis.dimensions} dimensions of {found.basis.selection}; against the "
        f"teacher's own ranking of them all, {queries} queries: {fidelity or 'not measured'}"
    )
