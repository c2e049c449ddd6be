"""``byline evaluate calibration``: are a head's probabilities right, and does it know what it cannot attribute?

Why it exists: the figures in docs/calibration.md must come from one command on a checkout alone. It does exactly what
the trainer does before it publishes (``byline.rankings.calibration_rows``), from label files: fit on validation
queries, judge on test queries and on null queries of other sources.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.table import Table

from byline.cli.evaluate_head import find_head
from byline.config import Settings, load_settings, repository_root
from byline.errors import FeatureMismatch
from byline.evaluation.result_file import git_commit, write_result
from byline.security.signing import Keyring

if TYPE_CHECKING:
    from byline.catalog.blobs import BlobStore
    from byline.rankings.calibration_rows import Embed, HeldOut
    from byline.rankings.label_files import FileLabels

FloatArray = npt.NDArray[np.float32]
#: Queries timed one by one, as a lookup worker sees them.
TIMED = 20
OUT = Path("reports/evaluate/calibration.json")


@dataclass(frozen=True)
class AskedPicture:
    """A query whose picture is in the blobs."""

    image_sha256: str
    prompt: str


def calibration(
    release: Annotated[str | None, typer.Option("--head", help=(
        "Release directory or head.safetensors. Default: a head fitted here."))] = None,
    labels: Annotated[Path | None, typer.Option("--labels", help="Label snapshot; else the configured one.")] = None,
    cutoff: Annotated[int, typer.Option("--cutoff", "-L", min=1, help="A positive is among the teacher's first L.")
                      ] = 100,
    nulls: Annotated[int, typer.Option("--nulls", min=2, help="Null queries of each kind.")] = 40,
    seed: Annotated[int | None, typer.Option("--seed", help="Of nulls, resampling and a head fitted here.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Where the JSON goes.")] = OUT,
) -> None:
    """Calibration error, coverage of the intervals, false attribution by kind of null query, real queries refused."""
    from byline.evaluation.calibration_figure import draw

    settings = load_settings()
    started = time.monotonic()
    used = settings.seed if seed is None else seed
    figures = evaluate(settings, labels or settings.labels_dir, release, cutoff, nulls, used)
    for table in _tables(figures):
        Console().print(table)
    write_result(out, figures, command=" ".join(["byline", *sys.argv[1:]]), seconds=time.monotonic() - started,
                 commit=git_commit(repository_root()), seed=used)
    drawn = draw(figures, out.with_suffix(".png"))
    typer.echo(f"written to {out}{'' if drawn else '; no figure, as matplotlib is not installed'}")


def evaluate(settings: Settings, labels: Path, head: str | None, cutoff: int, per_kind: int, seed: int
             ) -> dict[str, Any]:  # fmt: skip
    """All figures of the result file. Raises what reading labels, head and generator raise."""
    from byline.catalog.blobs import BlobStore
    from byline.diffusion.model import DiffusionModel
    from byline.evaluation.calibrate import ALLOWED
    from byline.features import load_extractor
    from byline.rankings.calibration_rows import CalibrationRows, calibrate
    from byline.rankings.features import LabelFeatures
    from byline.rankings.label_files import read_label_files
    from byline.rankings.query_evidence import QueryEvidence

    files = read_label_files(labels, settings.corpus_source, settings.model_directory, settings.feature_spec,
                             settings.cache_dir, settings.device, _progress)
    named, embed, vectors = _embedded(files, head, Keyring.parse(settings.signing_key), cutoff, seed)
    model = DiffusionModel.load(settings.model_directory, settings.device)
    extractor = load_extractor(settings.feature_spec, device=settings.device, model=model)
    with tempfile.TemporaryDirectory(prefix="byline-queries-") as folder:
        blobs, corpus = BlobStore(Path(folder)), files.header.corpus_id
        evidence = QueryEvidence(extractor, model, blobs, settings.cache_dir, corpus, per_kind=per_kind, seed=seed)
        rows = CalibrationRows(LabelFeatures(extractor, blobs, settings.cache_dir, corpus), evidence, files.captions,
                               _progress)
        validation, test = (_held_out(files, split, cutoff, blobs) for split in ("validation", "test"))
        found = calibrate(embed, vectors, validation, test, rows, top=cutoff, seed=seed)
    return {
        **found.to_json(), "head": named, "L": cutoff, "allowed": ALLOWED, "nulls_per_kind": per_kind,
        "queries": {"fitted_on": validation.labelled.queries, "judged_on": test.labelled.queries},
        "evidence_ms": _evidence_ms(settings, model, files, extractor), "calibrator": found.calibrator.to_json(),
    }  # fmt: skip


def _embedded(files: FileLabels, head: str | None, keyring: Keyring, cutoff: int, seed: int
              ) -> tuple[str, Embed, FloatArray]:  # fmt: skip
    """Name, embedding of queries, and items' vectors [n, d] of the head that is judged."""
    from byline.evaluation.study_student import StudentSettings, fit_student
    from byline.ranker.head import load_head

    named = find_head(None, "", head, keyring)
    if named.path is None:
        student = fit_student(files.labelled("train"), files.labelled("validation", cutoff=cutoff), files.blocks,
                              StudentSettings(evaluate_at=cutoff), seed)
        return named.name, student.query_vectors, student.item_vectors(files.item_features)
    loaded = load_head(named.path)
    if tuple((block.name, block.dim) for block in loaded.config.blocks) != files.blocks:
        raise FeatureMismatch(f"{named.name} takes other features than {files.feature_spec}; set BYLINE_FEATURE_SPEC")
    return named.name, loaded.embed_queries, loaded.embed_items(files.item_features)


def _held_out(files: FileLabels, split: str, cutoff: int, blobs: BlobStore) -> HeldOut:
    from byline.rankings.calibration_rows import HeldOut

    asked = []
    for query in files.of(split, cutoff):
        blobs.put(query.image)
        asked.append(AskedPicture(hashlib.sha256(query.image).hexdigest(), query.prompt))
    return HeldOut(files.labelled(split, cutoff=cutoff), asked)


def _evidence_ms(settings: Settings, model: Any, files: FileLabels, extractor: Any) -> dict[str, float]:
    """Median milliseconds that a query's evidence adds to its features; one query at a time, as served."""
    from byline.catalog.decode import decode_image
    from byline.features import load_evidence
    from byline.features.prompt_gain import NAME

    gain = load_evidence(NAME, device=settings.device, model=model)
    pairs = [(decode_image(query.image), query.prompt) for query in files.queries[: TIMED + 1]]
    spent: dict[str, list[float]] = {"features": [], "evidence": []}
    for image, prompt in pairs:
        # In this order, for the generator remembers the prompt's token states: they are paid for by the features.
        for name, made_by in (("features", extractor), ("evidence", gain)):
            started = time.perf_counter()
            made_by.extract([image], [prompt])
            spent[name].append(1e3 * (time.perf_counter() - started))
    return {name: round(float(np.median(times[1:])), 2) for name, times in spent.items()}


def _progress(what: str, done: int, total: int) -> None:
    if done == total:
        typer.echo(f"{what}: {total}", err=True)


def _tables(figures: dict[str, Any]) -> Sequence[Table]:
    tables, curve, floors = [], figures["curve"], figures["abstention"]
    if curve is not None:
        table = Table("over", "calibration error", "luck alone, 95 %", "pairs", title_justify="left",
                      title=f"P(among the first {curve['top']}), {curve['retrieved']['queries']} test queries")
        for name, text in (("retrieved", f"the first {curve['top']} retrieved"), ("shown", "the first 20 retrieved"),
                           ("everything", "all items")):
            part = curve[name]
            table.add_row(text, f"{part['error']:.4f}", f"{part['luck']:.4f}", str(part["pairs"]))
        interval = curve["interval"]
        table.caption = (f"intervals of {interval['nominal']:.0%} hold {interval['coverage']:.1%}, "
                         f"mean width {interval['mean_width']:.2f}")
        tables.append(table)
    if floors is not None:
        table = Table("queries", "answered as attributable", "floors fitted without the kind", title_justify="left",
                      title=f"{floors['nulls']} null queries, judged by floors their sources did not fit")
        for kind, share in floors["false_attribution"].items():
            table.add_row(kind, f"{share:.1%}", f"{floors['unseen_kind'][kind]:.1%}")
        table.add_row("all null queries", f"{floors['pooled']:.1%}", "")
        table.add_row("all, by the score alone", f"{floors['false_attribution_alone']:.1%}", "")
        table.add_section()
        if floors["shuffled_passed"] is not None:
            table.add_row("real images, other prompts", f"{floors['shuffled_passed']:.1%}", "")
        table.add_row(f"real test queries ({floors['queries']})", f"{1 - floors['refused']:.1%}", "")
        table.add_row("the same, by the score alone", f"{1 - floors['refused_alone']:.1%}", "")
        spent = figures["evidence_ms"]
        table.caption = f"a query's features take {spent['features']} ms, its evidence {spent['evidence']} ms more"
        tables.append(table)
    return tables
