"""``byline evaluate teacher``: the validation gate of the first-order form, or any teachers against each other.

Why it exists: which form of the teacher curation uses is decided by this command's figures and nothing else. It needs
a model directory, a corpus file and a label snapshot, no server; killed, it goes on where it was.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from byline.config import LAYER_SELECTIONS, TEACHER_NAMES, repository_root
from byline.errors import InvalidRequest

if TYPE_CHECKING:
    from byline.evaluation.teacher_scores import Question
    from byline.teachers import Teacher, TeacherItem

#: Seconds between two lines of progress.
_EVERY = 15.0


def teacher(
    model: Annotated[Path, typer.Option("--model", help="Directory of the model.")] = Path("data/generator"),
    corpus: Annotated[Path, typer.Option("--corpus", help="The corpus as a parquet file.")] = Path(
        "data/openclipart/items.parquet"
    ),
    labels: Annotated[Path, typer.Option("--labels", help="Label snapshot: queries and their nearest items.")] = Path(
        "data/labels"
    ),
    teachers: Annotated[
        str, typer.Option("--teachers", help="Compare these instead, e.g. abu_plus_linear,d_trak,similarity:pixels.")
    ] = "",
    queries: Annotated[int, typer.Option("--queries", min=1)] = 20,
    candidates: Annotated[int, typer.Option("--candidates", min=2, help="Half nearest, half random.")] = 400,
    draws: Annotated[int, typer.Option("--draws", min=8, help="Noise draws per item.")] = 64,
    query_draws: Annotated[int, typer.Option("--query-draws", min=8)] = 256,
    selection: Annotated[str, typer.Option("--layers", help=" | ".join(LAYER_SELECTIONS))] = "cross_attention_kv",
    damping: Annotated[float, typer.Option("--damping", min=0)] = 0.1,
    aggregation: Annotated[str, typer.Option("--aggregation", help="sum | skew | unit")] = "sum",
    objective: Annotated[str, typer.Option("--objective", help="denoising | output_norm")] = "denoising",
    noise: Annotated[str, typer.Option("--noise", help="item | shared")] = "shared",
    decade_queries: Annotated[int, typer.Option("--decade-queries", min=0, help="0: no step sizes.")] = 2,
    decade_candidates: Annotated[int, typer.Option("--decade-candidates", min=2)] = 100,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    device: Annotated[str, typer.Option("--device")] = "cpu",
    cache: Annotated[Path, typer.Option("--cache", help="Fitted things that the model came without.")] = Path(
        ".byline/cache"
    ),
    work: Annotated[Path, typer.Option("--work", help="Resumable rows.")] = Path(".byline/evaluate"),
    out: Annotated[Path, typer.Option("--out")] = Path("reports/evaluate/teacher.json"),
) -> None:
    """Does the first-order teacher order candidates as the exact one does? Or: how do any teachers agree?"""
    names = [name.strip() for name in teachers.split(",") if name.strip()]
    _validate(names, selection, aggregation, objective, noise, damping)
    # Heavy imports here: `byline evaluate --help` must not wait for torch.
    from byline.diffusion.model import DiffusionModel
    from byline.evaluation.corpus_file import read_corpus
    from byline.evaluation.result_file import git_commit, write_result
    from byline.evaluation.teacher_scores import ScoreRows, questions
    from byline.rankings.snapshot import read_snapshot
    from byline.teachers.files import TeacherFiles
    from byline.teachers.natural_gradient import UnlearningSettings
    from byline.teachers.registry import load_ready_teacher

    started = time.monotonic()
    loaded = DiffusionModel.load(model, device)
    items = read_corpus(corpus)
    asked = questions(
        read_snapshot(labels)[1], items, _as_query, count=queries, candidates=candidates, seed=seed
    )
    settings = UnlearningSettings(
        corpus_size=len(items), query_draws=query_draws, item_draws=draws, damping=damping, seed=seed,
        noise=noise, aggregation=aggregation, objective=objective,  # type: ignore[arg-type]  # checked by _validate
    )  # fmt: skip
    report = _Reporter()

    def make(name: str, other_noise: bool = False) -> Teacher:
        return load_ready_teacher(
            name, loaded, TeacherFiles.beside(model, cache, loaded.revision),
            replace(settings, seed=seed + 1) if other_noise else settings, lambda: items, selection=selection,
            progress=lambda done, total: report(f"fitting {name}", done, total),
        )  # fmt: skip

    rows = ScoreRows(work / "teacher-scores.jsonl")
    figures: dict[str, Any] = {
        "model_revision": loaded.revision, "queries": len(asked), "candidates": candidates, "draws": draws,
        "query_draws": query_draws, "layers": selection, "damping": damping, "aggregation": aggregation,
        "objective": objective, "noise": noise,
    }  # fmt: skip
    if names:
        figures |= _compare(names, make, asked, rows, report, work)
    else:
        figures |= _gate(make, asked, rows, report, work, decade_queries, decade_candidates)
    write_result(out, figures, command=" ".join(["byline", *sys.argv[1:]]), seconds=time.monotonic() - started,
                 commit=git_commit(repository_root()), seed=seed)  # fmt: skip
    typer.echo(f"written to {out}")
    if not names and _draw(figures, out.with_suffix(".png")):
        typer.echo(f"drawn to {out.with_suffix('.png')}")


def _gate(
    make: Callable[[str, bool], Teacher], asked: list[Question], rows: Any, report: Any, work: Path,
    decade_queries: int, decade_candidates: int,
) -> dict[str, Any]:  # fmt: skip
    """Run the gate, print it, and give its figures."""
    from byline.evaluation.teacher_gate import GateTeachers, run_gate, step_decades

    exact, linear = make("abu_plus", False), make("abu_plus_linear", False)
    gate = run_gate(GateTeachers(exact, linear, make("abu_plus", True)), asked, rows, report, store=work / "passes")
    if decade_queries:
        few = [replace(q, candidates=_spread(q.candidates, decade_candidates)) for q in asked[:decade_queries]]
        decades = step_decades(exact, linear, few, range(-2, 3), work / "teacher-steps.jsonl", report)
        gate = replace(gate, decades=decades)
    found = gate.to_json()
    console = Console()
    table = Table("", "Spearman", "overlap@20", "overlap@100", title="First order against exact", title_justify="left")
    for name, label in (("gate", "first order / exact, same noise"), ("self", "exact / exact, other noise"),
                        ("cross", "first order / exact, other noise")):  # fmt: skip
        table.add_row(label, *_cells(found[name]))
    console.print(table)
    if found["decades"]:
        steps = Table("step", "Spearman", "slope", "lost in rounding", title="Exact form by step size against first "
                      "order", title_justify="left")  # fmt: skip
        for row in found["decades"]:
            steps.add_row(row["step"], _text(row["spearman"]), _text(row["slope"]), f"{row['lost']:.1e}")
        console.print(steps)
    verdict = "PASSED" if gate.decision.passed else "NOT PASSED"
    chosen = "abu_plus_linear" if gate.decision.passed else "abu_plus"
    typer.echo(f"{verdict}: {gate.decision.why}. For curation: BYLINE_CURATION_TEACHER={chosen}")
    return {**found, "curation_teacher": chosen, "teacher_ids": [exact.teacher_id, linear.teacher_id]}


def _compare(
    names: list[str], make: Callable[[str, bool], Teacher], asked: list[Question], rows: Any, report: Any,
    work: Path,
) -> dict[str, Any]:  # fmt: skip
    """Compare the named teachers pairwise, print the table, and give the figures."""
    from byline.evaluation.teacher_gate import compare

    made = {name: make(name, False) for name in names}
    pairs, seconds = compare(made, asked, rows, report, store=work / "passes")
    table = Table("teacher", "teacher", "Spearman", "overlap@20", "overlap@100")
    for pair in pairs:
        table.add_row(pair["one"], pair["two"], *_cells(pair))
    Console().print(table)
    return {
        "rows": pairs, "seconds_per_query": {name: round(value, 3) for name, value in seconds.items()},
        "teacher_ids": {name: one.teacher_id for name, one in made.items()},
    }  # fmt: skip


class _Reporter:
    """One line of progress every few seconds, with the time that is left of this part."""

    def __init__(self) -> None:
        self._label = ""
        self._begun = self._said = 0.0
        self._first = 0

    def __call__(self, label: str, done: int, total: int) -> None:
        now = time.monotonic()
        if label != self._label:
            self._label, self._begun, self._said, self._first = label, now, now, done
        if now - self._said < _EVERY and done < total:
            return
        self._said = now
        fresh, rest = done - self._first, total - done
        left = f", {(now - self._begun) / fresh * rest / 60:.1f} min left" if fresh > 0 and rest > 0 else ""
        typer.echo(f"{label}: {done} of {total}{left}", err=True)


def _validate(
    names: list[str], selection: str, aggregation: str, objective: str, noise: str, damping: float
) -> None:
    for name in names:
        if name not in TEACHER_NAMES:
            raise InvalidRequest("--teachers", f"no teacher is called {name!r}; there are {', '.join(TEACHER_NAMES)}")
    choices = (
        ("--layers", selection, LAYER_SELECTIONS), ("--aggregation", aggregation, ("sum", "skew", "unit")),
        ("--objective", objective, ("denoising", "output_norm")),
        ("--noise", noise, ("item", "shared")),
    )  # fmt: skip
    for option, value, known in choices:
        if value not in known:
            raise InvalidRequest(option, f"{value!r} is not one of {', '.join(known)}")
    if len(names) == 1:
        raise InvalidRequest("--teachers", "one teacher alone cannot be compared; name two, or none for the gate")


def _as_query(labelled: Any) -> Any:
    import io

    from PIL import Image

    from byline.teachers.ranking import TeacherQuery

    return TeacherQuery(Image.open(io.BytesIO(labelled.image)).convert("RGB"), labelled.prompt)


def _spread(candidates: tuple[TeacherItem, ...], count: int) -> tuple[TeacherItem, ...]:
    """``count`` of the candidates, evenly spaced."""
    if count >= len(candidates):
        return candidates
    return tuple(candidates[round(n * (len(candidates) - 1) / (count - 1))] for n in range(count))


def _cells(figures: dict[str, Any]) -> list[str]:
    error = figures["standard_error"]
    return [f"{_text(figures[name])} ± {_text(error[name])}" for name in ("spearman", "overlap20", "overlap100")]


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _draw(figures: dict[str, Any], path: Path) -> bool:
    """Per query and per step size; False where matplotlib, a development dependency, is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for name, label in (("gate", "first order / exact"), ("self", "exact / exact, other noise")):
        left.plot([row[name]["spearman"] for row in figures["rows"]], "o", ms=4, label=label)
    left.axhline(0.95, color="grey", lw=0.8)
    left.set(xlabel="query", ylabel="Spearman")
    left.legend()
    for name in ("spearman", "slope"):
        right.plot([r["decade"] for r in figures["decades"]], [r[name] for r in figures["decades"]], "o-", label=name)
    right.axhline(1, color="grey", lw=0.8)
    right.set(xlabel="step, decades of 1 / N", title="exact form by step size")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
