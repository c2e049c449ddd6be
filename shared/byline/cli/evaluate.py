"""``byline evaluate``: what a released head is worth on held-out queries, as a table and a JSON file.

Why it exists: the numbers on the demo's page and in the docs must be reproducible by one command on any machine that
holds the labels, and always come with raw features, no-image baselines and the labels' ceiling beside them.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine

from byline.catalog.blobs import BlobStore
from byline.catalog.store import CatalogStore
from byline.cli.evaluate_retraining import counterfactual, lds
from byline.cli.evaluate_teacher import teacher
from byline.config import Settings, load_settings, repository_root
from byline.db.session import make_engine
from byline.errors import FeatureMismatch, LabelsNotUsable, NoActiveRelease
from byline.evaluation.head_report import HeadReport, report_head
from byline.evaluation.result_file import git_commit, write_result
from byline.rankings.labelled import JUDGE, LEARN, judging_queries, labelled_set, load_splits
from byline.rankings.store import RankingStore
from byline.releases.manifest import HEAD
from byline.releases.registry import ReleaseRecord, ReleaseRegistry

app = typer.Typer(help="Judge heads and teachers; every result is a JSON file under reports/.", no_args_is_help=True)


app.command()(lds)
app.command()(counterfactual)
app.command()(teacher)


@app.callback()
def group() -> None:
    """Judge heads and teachers; every result is a JSON file under reports/."""


@app.command()
def head(
    release: Annotated[str | None, typer.Option("--release", help="Release id; default: the active one.")] = None,
    split: Annotated[str, typer.Option("--split", help="Held-out queries: test or validation.")] = "test",
    cutoff: Annotated[int, typer.Option("--cutoff", "-L", min=1, help="L of mAP(L).")] = 100,
    model: Annotated[str | None, typer.Option("--model", help="Model id; default: the configured one.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Where the JSON goes.")] = Path("reports/evaluate/head.json"),
) -> None:
    """mAP(L) of a release's head beside raw features, no-image baselines and the ceiling of the labels."""
    settings = load_settings()
    started = time.monotonic()
    engine = make_engine(settings.database_url)
    try:
        record = _release(engine, model or settings.model_id, release)
        report = evaluate_release(engine, settings, record, split, cutoff)
    finally:
        engine.dispose()
    Console().print(_table(report, record.release_id, split))
    figures = {**report.to_json(), "release_id": record.release_id, "split": split}
    write_result(out, figures, command=" ".join(["byline", *sys.argv[1:]]), seconds=time.monotonic() - started,
                 commit=git_commit(repository_root()), seed=settings.seed)
    typer.echo(f"written to {out}")


def evaluate_release(engine: Engine, settings: Settings, record: ReleaseRecord, split: str, cutoff: int) -> HeadReport:
    """The report of one release on one split. LabelsNotUsable when the split holds no rankings."""
    # Heavy imports here: `byline evaluate --help` must not wait for torch.
    from byline.diffusion.model import DiffusionModel
    from byline.features import load_extractor
    from byline.ranker.head import load_head
    from byline.rankings.features import LabelFeatures

    manifest = record.manifest
    catalog = CatalogStore(engine)
    model = catalog.model(manifest.model_id)
    splits = load_splits(RankingStore(engine), manifest.model_id, manifest.teacher_id)
    rankings = {"test": splits.test, "validation": splits.validation}.get(split, ())
    if not rankings or not splits.train:
        raise LabelsNotUsable(f"there are {len(rankings)} rankings of split {split!r} by {manifest.teacher_id} and "
                              f"{len(splits.train)} to train on; import labels, or choose another --split")
    needs_model = "denoiser" in manifest.feature_spec.split("+")
    diffusion = DiffusionModel.load(model.directory, settings.device) if needs_model else None
    extractor = load_extractor(manifest.feature_spec, device=settings.device, model=diffusion)
    if extractor.preprocessing_hash != manifest.preprocessing_hash:
        raise FeatureMismatch(f"release {manifest.release_id} was made with other encoder weights or preprocessing")
    features = LabelFeatures(extractor, BlobStore(settings.blob_dir), settings.cache_dir, manifest.corpus_id)
    items = catalog.items(manifest.corpus_id)
    ids = np.asarray([item.item_id for item in items], dtype=np.int64)
    item_rows = features.of_items(items, _no_progress)
    held = judging_queries(rankings, cutoff)
    held_rows = features.of_queries(held, _no_progress)
    held_out = labelled_set(held, held_rows, ids, item_rows, JUDGE)
    train = labelled_set(splits.train, features.of_queries(splits.train, _no_progress), ids, item_rows, LEARN)
    disjoint = all(ranking.tau_halves is not None for ranking in held)
    other = labelled_set(held, held_rows, ids, item_rows, LEARN).tau if disjoint else None
    scores = load_head(record.directory / HEAD).scores(held_rows, item_rows)
    return report_head(scores, held_out, train, list(features.blocks), cutoff=cutoff, other_half=other,
                       seed=settings.seed)


def _release(engine: Engine, model_id: str, release_id: str | None) -> ReleaseRecord:
    registry = ReleaseRegistry(engine)
    if release_id is not None:
        return registry.get(release_id)
    active = registry.active(model_id)
    if active is None:
        raise NoActiveRelease(f"no release of {model_id} is active yet; name one with --release", model_id=model_id)
    return registry.get(active.release_id)


def _table(report: HeadReport, release_id: str, split: str) -> Table:
    table = Table("order", "kind", f"mAP({report.cutoff})", "± s.e.", "head − this", "95 %", "p",
                  title=f"Release {release_id} on {report.queries} {split} queries", title_justify="left")
    for row in report.rows:
        gain = row.head_gain
        against = ("", "", "") if gain is None else (
            f"{gain.mean:+.3f}", f"{gain.low:+.3f} … {gain.high:+.3f}", f"{gain.p_value:.4f}")
        table.add_row(row.name, row.kind, f"{row.result.mean:.3f}", f"{row.result.standard_error:.3f}", *against)
    return table


def _no_progress(done: int, total: int) -> None:
    """Features come from the trainer's cache as a rule; nothing to show."""
