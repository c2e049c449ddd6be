"""``byline evaluate lds`` and ``byline evaluate counterfactual``: teachers judged by training again.

Why it exists: agreement with another teacher says nothing about the truth; retraining does. Both commands may be
stopped and started at will: rows of retrainings and scores of teachers are kept in the study's folder, and a second
call makes only what is missing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from byline.config import Settings, load_settings, repository_root
from byline.errors import LabelsNotUsable
from byline.evaluation.result_file import git_commit, write_result

if TYPE_CHECKING:
    from byline.evaluation.retraining import Outcome, RetrainingStore
    from byline.evaluation.retraining_report import CounterfactualRow, LdsTable
    from byline.evaluation.retraining_scores import ScoreBook
    from byline.evaluation.retraining_study import Study

#: The variant curation uses, and the published one: what the tables compare the others with.
CHOSEN = "abu_plus_linear cross_attention_kv 0.1 output_norm"
PUBLISHED = "abu_plus_linear cross_attention_kv 0.1 sum"
TEACHERS = ("abu_plus_linear,abu_linear,gradient_linear,trak,d_trak,similarity:pixels,similarity:efficientnet_lite0,"
            "similarity:minilm,similarity:denoiser")  # fmt: skip
#: What heads see that are taught by the reference: the default student, and one without the gradient.
HEADS = ("minilm+gradient", "minilm+denoiser")
METHODS = ("random", "caption words", "similarity:pixels", "similarity:efficientnet_lite0", "similarity:minilm",
           "similarity:denoiser", "abu_linear cross_attention_kv 0.1 sum", "gradient_linear all sum",
           "trak all 0.1", "d_trak all 0.1", *(f"head {features}" for features in HEADS))  # fmt: skip
#: Of a printed table: a variant's name must not be broken.
WIDTH = 150

Size = Annotated[str, typer.Option("--size", help="cpu (two hours of two cores), fuller (wants a GPU) or tiny.")]
Work = Annotated[Path, typer.Option("--work", help="Where studies, retrainings and scores are kept.")]
Reference = Annotated[str, typer.Option("--reference", help="The variant the others are compared with.")]
Names = Annotated[str, typer.Option("--teachers", help="Registered teachers, separated by commas; '' for none.")]
Forms = Annotated[str, typer.Option("--forms", help="Of the first-order teachers: one pass over the corpus each.")]
NoTraining = Annotated[bool, typer.Option("--no-training", help="Only judge by the retrainings that are there.")]


def lds(
    size: Size = "cpu",
    halves: Annotated[int, typer.Option("--halves", min=3, help="Retrainings on random halves.")] = 24,
    teachers: Names = TEACHERS,
    reference: Reference = CHOSEN,
    head: Annotated[bool, typer.Option("--head/--no-head", help="Also a head taught by the reference.")] = True,
    forms: Forms = "sum,output_norm,unit,skew",
    no_training: NoTraining = False,
    work: Work = Path(".byline/retraining"),
    out: Annotated[Path, typer.Option("--out", help="Where the JSON goes.")] = Path("reports/evaluate/lds.json"),
) -> None:
    """Linear datamodeling score of every teacher variant, raw feature and the head by half-corpus retrainings."""
    from byline.evaluation.retraining import half_corpus
    from byline.evaluation.retraining_report import lds_table, retraining_rows

    started, settings = time.monotonic(), load_settings()
    study, store = open_study(settings, size, work)
    wanted = [half_corpus(study.item_ids.tolist(), number, study.settings.seed) for number in range(halves)]
    if not no_training:
        store.run(wanted, _clock("half-corpus retrainings"))
    rows = store.rows()
    done = [rows[r.key(study.study_id)] for r in wanted if r.key(study.study_id) in rows]
    if len(done) < 3:
        raise LabelsNotUsable(f"{len(done)} half-corpus retrainings are there; let the command finish at least 3")
    book = open_scores(study, size, forms.split(","))
    skipped = book.ensure([name for name in teachers.split(",") if name])
    if head:
        _ensure_heads(book, reference, size)
    table = lds_table(done, study.item_ids, {n: book.get(n) for n in book.names()}, reference, study.settings.seed)
    Console(width=WIDTH).print(_lds_view(table, reference))
    figures = {
        "study": _facts(study), "skipped": skipped, **table.to_json(reference),
        "rows": retraining_rows(wanted, rows, study.study_id, {}),
    }  # fmt: skip
    _write(out, figures, settings, started)


def counterfactual(
    size: Size = "cpu",
    methods: Annotated[str, typer.Option("--methods", help="Variants or teachers, separated by commas.")] = "",
    reference: Reference = CHOSEN,
    nothing: Annotated[int, typer.Option("--nothing", min=1, help="Runs with nothing removed.")] = 4,
    groups: Annotated[int, typer.Option("--groups", min=1, help="Groups of queries to go through.")] = 3,
    arms: Annotated[int, typer.Option("--arms", min=0, help="Stop after so many arms; 0 for all.")] = 0,
    no_training: NoTraining = False,
    work: Work = Path(".byline/retraining"),
    out: Annotated[Path, typer.Option("--out", help="Where the JSON goes.")] = Path(
        "reports/evaluate/counterfactual.json"),
) -> None:  # fmt: skip
    """Leave-k-out: the rise of a query's loss after training without what each method names."""
    from byline.evaluation.counterfactual import plan_arms
    from byline.evaluation.retraining import nothing_removed, without
    from byline.evaluation.retraining_report import counterfactual_json, counterfactual_table, retraining_rows

    started, settings = time.monotonic(), load_settings()
    study, store = open_study(settings, size, work)
    book = open_scores(study, size)
    chosen = [m for m in methods.split(",") if m] or [reference, PUBLISHED, *METHODS]
    skipped = book.ensure_variants([m for m in chosen if not m.startswith("head ")])
    if any(m.startswith("head ") for m in chosen):
        _ensure_heads(book, reference, size)
    tau = {m: book.get(m) for m in dict.fromkeys(chosen) if book.has(m)}
    plan = [a for a in plan_arms(tau, study.item_ids, study.prompt_likeness()) if a.group < groups]
    plan = plan[:arms] if arms else plan
    fresh = [nothing_removed(number) for number in range(nothing)]
    runs = [*fresh, *dict.fromkeys(without(a.removed) for a in plan)]
    if not no_training:
        store.run(runs, _clock("retrainings"))
    rows = store.rows()
    base: list[Outcome] = [rows[r.key(study.study_id)] for r in fresh if r.key(study.study_id) in rows]
    table = counterfactual_table(plan, rows, study.study_id, base, reference)
    Console(width=WIDTH).print(_counterfactual_view(table, reference))
    labels: dict[str, Any] = {}
    for arm in plan:
        entry = {"method": arm.method, "k": arm.k, "group": arm.group, "targets": list(arm.targets)}
        labels.setdefault(without(arm.removed).key(study.study_id), []).append(entry)
    lines = retraining_rows(runs, rows, study.study_id, labels)
    figures = {"study": _facts(study), "skipped": skipped, **counterfactual_json(table, reference, len(lines)),
               "rows_of_retrainings": lines}  # fmt: skip
    _write(out, figures, settings, started)


def open_study(settings: Settings, size: str, work: Path) -> tuple[Study, RetrainingStore]:
    """The study of a named size and its retrainings; made where it is not there. LabelsNotUsable for other names."""
    import torch

    from byline.evaluation.retraining import RetrainingStore, picture_likeness
    from byline.evaluation.retraining_study import SIZES, Study

    if size not in SIZES:
        raise LabelsNotUsable(f"there is no study of size {size!r}; choose one of {', '.join(SIZES)}")
    torch.set_num_threads(settings.torch_threads)
    study = Study(SIZES[size], settings.corpus_source, settings.model_directory, work, settings.device)
    study.prepare(_clock("training steps of the study's own model"))
    return study, RetrainingStore(study, None if size == "tiny" else picture_likeness(settings.device))


def open_scores(study: Study, size: str, forms: Sequence[str] = ()) -> ScoreBook:
    """The study's scores of teachers. LabelsNotUsable for an unknown form."""
    from dataclasses import replace

    from byline.evaluation.retraining_scores import FORMS, ScoreBook, ScoreSettings

    if unknown := set(forms) - set(FORMS):
        raise LabelsNotUsable(f"there is no form {sorted(unknown)}; choose from {', '.join(FORMS)}")
    tiny = ScoreSettings(query_draws=8, item_draws=8, samples=32, dampings=(0.1,))
    settings = tiny if size == "tiny" else ScoreSettings()
    chosen = tuple(FORMS[form] for form in forms) or settings.forms
    return ScoreBook(study, replace(settings, forms=chosen), _stages())


def _ensure_heads(book: ScoreBook, reference: str, size: str) -> None:
    from byline.evaluation.retraining_head import HeadSettings, score_head

    for features in HEADS:
        if not book.has(f"head {features}"):
            chosen = HeadSettings(features=features)
            tiny = HeadSettings(queries=10, features=features, hidden=(16,), out_dim=16, max_steps=4, basis_draws=2)
            book.put(f"head {features}", score_head(book, reference, tiny if size == "tiny" else chosen))


def _facts(study: Study) -> dict[str, Any]:
    from dataclasses import asdict

    return {"study_id": study.study_id, "items": len(study.items), "settings": asdict(study.settings)}


def _write(out: Path, figures: dict[str, Any], settings: Settings, started: float) -> None:
    write_result(out, figures, command=" ".join(["byline", *sys.argv[1:]]), seconds=time.monotonic() - started,
                 commit=git_commit(repository_root()), seed=settings.seed)  # fmt: skip
    typer.echo(f"written to {out}")


def _lds_view(table: LdsTable, reference: str) -> Table:
    view = Table("variant", "LDS", "± s.e.", "queries", "subsets", "pooled", "pictures", "lead of reference",
                 title_justify="left",
                 title=f"{table.retrainings} half-corpus retrainings; reference: {reference}")  # fmt: skip
    for name, s in table.losses.items():
        lead = "" if s.lead is None else f"{s.lead.mean:+.3f} ± {s.lead.error:.3f}"
        view.add_row(name, f"{s.mean:+.3f}", f"{s.error:.3f}", f"{s.error_queries:.3f}", f"{s.error_subsets:.3f}",
                     f"{s.pooled:+.3f}", f"{table.pictures[name].mean:+.3f}", lead)  # fmt: skip
    return view


def _counterfactual_view(table: Sequence[CounterfactualRow], reference: str) -> Table:
    view = Table("k", "method", "loss %", "± s.e.", "picture MSE ×1000", "likeness", "targets", "lead of reference",
                 title_justify="left",
                 title=f"Leave-k-out: target minus other queries; reference: {reference}")  # fmt: skip
    for r in table:
        lead = "" if r.lead is None else f"{r.lead.mean:+.2f} ± {r.lead.error:.2f}"
        view.add_row(str(r.k), r.method, f"{r.loss.mean:+.2f}", f"{r.loss.error:.2f}",
                     f"{r.picture.mean:+.1f} ± {r.picture.error:.1f}", f"{r.cosine.mean:+.3f}",
                     str(len(r.loss.per_target)), lead)  # fmt: skip
    return view


def _clock(what: str, every: float = 30.0) -> Any:
    """A progress callback that prints how far it is and the time left, at most every ``every`` seconds."""
    began, state = time.monotonic(), {"first": -1.0, "said": -every}

    def show(done: float, total: int) -> None:
        now = time.monotonic() - began
        if state["first"] < 0 or done < state["first"]:
            state["first"] = done
        if now - state["said"] < every and done < total:
            return
        state["said"] = now
        fresh = done - state["first"]
        left = f", {(total - done) * now / fresh / 60:.0f} min left" if fresh > 0 else ""
        typer.echo(f"{what}: {done:.1f} of {total}{left}")

    return show


def _stages() -> Any:
    """A progress callback over named stages, one clock each."""
    clocks: dict[str, Any] = {}

    def show(stage: str, done: int, total: int) -> None:
        clocks.setdefault(stage, _clock(stage))(done, total)

    return show
