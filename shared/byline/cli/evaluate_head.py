"""``byline evaluate head``: what a head is worth on held-out queries, as tables, a JSON file and a figure.

Why it exists: the numbers on the demo's page and in the docs must be reproducible by one command on any machine that
holds the labels, and always come with raw features, no-image baselines and the labels' ceiling beside them. With
``--labels`` a label file is enough: no server, and a head is fitted on the spot if none is named.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine

from byline.cli.judged_labels import FloatArray, JudgedLabels, from_database, from_files
from byline.config import Settings, load_settings, repository_root
from byline.db.session import make_engine
from byline.errors import FeatureMismatch, InvalidRequest, LabelsNotUsable, NoActiveRelease
from byline.evaluation.head_figure import draw
from byline.evaluation.head_measures import CUTOFFS, Judged, Order, judge_orders
from byline.evaluation.head_report import TEXT_FEATURES, HeadReport, report_head
from byline.evaluation.head_slices import Slice, creator_of_top, distance_thirds, prompt_clusters, slices
from byline.evaluation.result_file import git_commit, write_result
from byline.releases.manifest import HEAD, ReleaseManifest
from byline.releases.registry import ReleaseRegistry
from byline.releases.vouched import vouched
from byline.security.signing import Keyring

FITTED = "fitted here"


@dataclass(frozen=True)
class NamedHead:
    """Where a head is and what it takes; ``path`` None is one to be fitted here, no manifest is a bare file."""

    name: str
    path: Path | None
    manifest: ReleaseManifest | None

    def feature_spec(self, configured: str) -> str:
        """The spec it was trained with, the configured one where nobody wrote it down."""
        return self.manifest.feature_spec if self.manifest else configured


def head(
    release: Annotated[str | None, typer.Option("--head", "--release", help=(
        "Release id, release directory or head.safetensors. Default: the active release; with --labels a head "
        "fitted here."))] = None,
    against: Annotated[str | None, typer.Option("--against", help="A second head, compared query by query.")] = None,
    labels: Annotated[Path | None, typer.Option("--labels", help=(
        "Judge by this label snapshot, with the configured corpus and model, without servers."))] = None,
    split: Annotated[str, typer.Option("--split", help="Held-out queries: test or validation.")] = "test",
    cutoff: Annotated[int, typer.Option("--cutoff", "-L", min=1, help="L of the headline mAP(L).")] = 100,
    cutoffs: Annotated[str, typer.Option("--cutoffs", help="Further L, with commas.")] = ",".join(map(str, CUTOFFS)),
    model: Annotated[str | None, typer.Option("--model", help="Model id; default: the configured one.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the bootstrap and of a head fitted here.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Where the JSON goes.")] = Path("reports/evaluate/head.json"),
) -> None:
    """A head beside raw features, no-image baselines and the ceiling: mAP(L), recall, NDCG, and by kind of query."""
    settings = load_settings()
    started = time.monotonic()
    if split not in ("test", "validation"):
        raise InvalidRequest("--split", f"is test or validation, not {split!r}")
    wanted = _numbers(cutoffs)
    used = settings.seed if seed is None else seed
    engine = None if labels is not None else make_engine(settings.database_url)
    try:
        keyring, model_id = Keyring.parse(settings.signing_key), model or settings.model_id
        first = find_head(engine, model_id, release, keyring)
        second = find_head(engine, model_id, against, keyring) if against is not None else None
        figures = evaluate(engine, settings, labels, first, second, split, cutoff, wanted, used)
    finally:
        if engine is not None:
            engine.dispose()
    write_result(out, figures, command=" ".join(["byline", *sys.argv[1:]]), seconds=time.monotonic() - started,
                 commit=git_commit(repository_root()), seed=used)
    drawn = draw(figures, out.with_suffix(".png"))
    typer.echo(f"written to {out}{'' if drawn else '; no figure, as matplotlib is not installed'}")


def find_head(engine: Engine | None, model_id: str, name: str | None, keyring: Keyring) -> NamedHead:
    """A head by release id, directory or file; None is the active release, or without database one fitted here.

    SignatureInvalid for a release that none of the keys signed, ReleaseCorrupt for one whose head was altered.
    """
    path = Path(name) if name is not None else None
    if path is not None and path.is_dir():
        manifest = vouched(path, keyring, files=(HEAD,))
        return NamedHead(manifest.release_id, path / HEAD, manifest)
    if path is not None and path.is_file():
        return NamedHead(path.stem if path.name != HEAD else str(path), path, None)
    if engine is None:
        if name is not None:
            raise InvalidRequest("--head", f"{name} is neither a release directory nor a head file; without servers "
                                 "(--labels) a head is named by its path")
        return NamedHead(FITTED, None, None)
    registry = ReleaseRegistry(engine)
    if name is None:
        active = registry.active(model_id)
        if active is None:
            raise NoActiveRelease(f"no release of {model_id} is active yet; name one with --head", model_id=model_id)
        name = active.release_id
    record = registry.get(name)
    vouched(record.directory, keyring, record.manifest, (HEAD,))
    return NamedHead(record.release_id, record.directory / HEAD, record.manifest)


def evaluate(engine: Engine | None, settings: Settings, labels: Path | None, first: NamedHead,
             second: NamedHead | None, split: str, cutoff: int, cutoffs: tuple[int, ...], seed: int
             ) -> dict[str, Any]:  # fmt: skip
    """All figures of the result file, shown as tables on the way. Labels come from files where there is no engine."""
    judged = _labels_for(first, first, engine, settings, labels, split, cutoff)
    report = report_head(head_scores(first, judged, cutoff, seed), judged.held_out, judged.train, list(judged.blocks),
                         cutoff=cutoff, other_half=judged.other_half, seed=seed)
    orders = list(report.orders)
    if second is not None:
        same = second.feature_spec(settings.feature_spec) == judged.feature_spec
        other = judged if same else _labels_for(second, first, engine, settings, labels, split, cutoff)
        if not np.array_equal(other.held_out.tau, judged.held_out.tau, equal_nan=True):
            raise LabelsNotUsable(f"{first.name} and {second.name} are judged by different labels: not comparable")
        orders.insert(1, Order(second.name, "other_head", head_scores(second, other, cutoff, seed)))
    rows = judge_orders(orders, judged.held_out.tau, seed=seed, cutoffs=sorted({cutoff, *cutoffs}))
    parts = kinds_of_queries(judged, report, seed)
    console = Console()
    for table in _tables(rows, first.name, split, judged.held_out.queries):
        console.print(table)
    console.print(_gains(report))
    if second is not None:
        console.print(_gains_over(rows[1], first.name))
    console.print(_slice_table(parts, cutoff))
    return {
        **report.to_json(), "release_id": first.manifest.release_id if first.manifest else None, "head": first.name,
        "against": second.name if second else None, "split": split, "orders": [row.to_json() for row in rows],
        "slices": [part.to_json() for part in parts],
    }  # fmt: skip


def head_scores(named: NamedHead, judged: JudgedLabels, cutoff: int, seed: int) -> FloatArray:
    """Scores [q, n] of the held-out queries. FeatureMismatch if the head takes other features than ``judged`` has."""
    from byline.ranker.head import load_head

    if named.path is None:
        return _fitted_scores(judged, cutoff, seed)
    one = load_head(named.path)
    blocks = tuple((block.name, block.dim) for block in one.config.blocks)
    if blocks != judged.blocks:
        raise FeatureMismatch(f"{named.name} takes the features {_spec(blocks)}, these are {_spec(judged.blocks)}; "
                              "name a release directory, or set BYLINE_FEATURE_SPEC")
    return one.scores(judged.held_out.query_features, judged.held_out.item_features)


def kinds_of_queries(judged: JudgedLabels, report: HeadReport, seed: int) -> tuple[Slice, ...]:
    """The held-out queries by prompt cluster (where there is a text feature), creator and distance."""
    train, held_out = judged.train, judged.held_out
    cuts: dict[str, list[str]] = {}
    start = 0
    for name, width in judged.blocks:
        if name in TEXT_FEATURES:
            columns = slice(start, start + width)
            cuts["prompt"] = prompt_clusters(train.query_features[:, columns], judged.train_prompts,
                                             held_out.query_features[:, columns], seed=seed)
        start += width
    cuts["creator of the teacher's first item"] = creator_of_top(held_out.tau, judged.creators)
    cuts["distance to the training queries"] = distance_thirds(train.query_features, held_out.query_features)
    own, raw, ceiling = report.best("head"), report.best("raw"), report.best("ceiling")
    if own is None or raw is None or own.result.per_query.shape[0] != held_out.queries:
        return ()
    return slices(cuts, own.result.per_query, raw.result.per_query,
                  None if ceiling is None else ceiling.result.per_query, seed=seed)


def _labels_for(named: NamedHead, first: NamedHead, engine: Engine | None, settings: Settings, labels: Path | None,
                split: str, cutoff: int) -> JudgedLabels:
    spec = named.feature_spec(settings.feature_spec)
    if engine is None:
        found = from_files(settings, labels or settings.labels_dir, spec, split, cutoff)
    else:
        # Two heads are judged by one teacher: the first one's.
        model_id, teacher = ((first.manifest.model_id, first.manifest.teacher_id) if first.manifest
                             else (settings.model_id, settings.curation_family))
        found = from_database(engine, settings, model_id, teacher, spec, split, cutoff)
    if named.manifest is not None and named.manifest.preprocessing_hash != found.preprocessing_hash:
        raise FeatureMismatch(f"release {named.name} was made with other encoder weights or preprocessing")
    return found


def _fitted_scores(judged: JudgedLabels, cutoff: int, seed: int) -> FloatArray:
    from byline.evaluation.study_student import StudentSettings, fit_student, narrowed

    if judged.validation is None:
        raise LabelsNotUsable("a head fitted here stops by validation queries, and there are none; name one by --head")
    settings, width = StudentSettings(evaluate_at=cutoff), load_settings().trainer_width
    student = fit_student(judged.train, judged.validation, judged.blocks, settings, seed)
    if student.width > width:  # as the trainer would serve it
        student = narrowed(student, width, judged.train, judged.validation, settings)
    return student.scores(judged.held_out)


def _numbers(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise InvalidRequest("--cutoffs", f"is a list of positive numbers with commas, not {text!r}")
    return tuple(int(part) for part in parts)


def _spec(blocks: tuple[tuple[str, int], ...]) -> str:
    return "+".join(f"{name}({dim})" for name, dim in blocks)


def _tables(rows: tuple[Judged, ...], name: str, split: str, queries: int) -> list[Table]:
    """One table of mAP(L) with standard errors and one of the other measures: both fit a terminal of 80 columns."""
    out: list[Table] = []
    title = f"{name} on {queries} {split} queries"
    maps = [measure for measure in rows[0].values if measure.startswith("map_")]
    rest = [measure for measure in rows[0].values if measure not in maps]
    for measures, error in ((maps, True), (rest, False)):
        table = Table("order", *(measure.replace("recall_", "rec_") for measure in measures), title=title,
                      title_justify="left")
        for row in rows:
            table.add_row(row.name, *(f"{row.mean(m):.3f}" + (f" ± {row.standard_error(m):.3f}" if error else "")
                                      for m in measures))
        out.append(table)
    return out


def _gains(report: HeadReport) -> Table:
    table = Table("order", "kind", "head − this", "95 %", "p", title_justify="left",
                  title=f"mAP({report.cutoff}), paired over queries")
    for row in report.rows:
        if row.head_gain is not None:
            table.add_row(row.name, row.kind, f"{row.head_gain.mean:+.3f}",
                          f"{row.head_gain.low:+.3f} … {row.head_gain.high:+.3f}", f"{row.head_gain.p_value:.4f}")
    return table


def _gains_over(other: Judged, name: str) -> Table:
    table = Table("measure", "difference", "95 %", "p", title=f"{name} − {other.name}", title_justify="left")
    for measure, gain in (other.gains or {}).items():
        table.add_row(measure, f"{gain.mean:+.3f}", f"{gain.low:+.3f} … {gain.high:+.3f}", f"{gain.p_value:.4f}")
    return table


def _slice_table(parts: tuple[Slice, ...], cutoff: int) -> Table:
    table = Table("queries", "n", f"mAP({cutoff})", "head − best raw", "ceiling", title="By kind of query",
                  title_justify="left")
    for place, part in enumerate(parts):
        if place == 0 or parts[place - 1].cut != part.cut:
            table.add_section()
            table.add_row(f"[bold]by {part.cut}[/bold]")
        table.add_row(part.name, str(part.queries), f"{part.head:.3f} ± {part.standard_error:.3f}",
                      f"{part.gain.mean:+.3f} ({part.gain.low:+.3f} … {part.gain.high:+.3f})",
                      "" if part.ceiling is None else f"{part.ceiling:.3f}")
    return table
