"""``byline study NAME``: one of the studies of the student, or ``all``.

Why it exists: which features, which loss, how much pruning, which teacher, how wide an embedding, which labels and
which options are decisions, and whoever doubts one can repeat its evidence with one command. No server is needed;
killed, a study goes on where it was. Writes ``reports/studies/NAME.json`` and ``.png``, and the tables and figures of
docs/studies.md.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from byline.config import Settings, load_settings, repository_root
from byline.errors import InvalidRequest

if TYPE_CHECKING:
    from byline.evaluation.study_bench import Bench

STUDIES = ("features", "losses", "pruning", "dimensions", "labels", "teachers", "gradient", "options")
#: Seconds between two lines of progress.
_EVERY = 15.0


def study(
    name: Annotated[str, typer.Argument(help=" | ".join((*STUDIES, "all")))],
    size: Annotated[str, typer.Option("--size", help="demo (2 cores), fuller (hours, or a GPU) or tiny.")] = "demo",
    seeds: Annotated[int, typer.Option("--seeds", min=0, help="Fits per configuration; 0: the size's own.")] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The first of them.")] = 0,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of torch.")] = 2,
    work: Annotated[Path, typer.Option("--work", help="Rows and fitted things, for the next run.")] = Path(
        ".byline/studies"),
    out: Annotated[Path, typer.Option("--out", help="Folder of JSON and figures.")] = Path("reports/studies"),
    lds: Annotated[Path, typer.Option("--lds", help="Result of `byline evaluate lds`, for the study of teachers.")] = (
        Path("reports/evaluate/lds.json")),
    page: Annotated[Path | None, typer.Option("--page", help="Document whose tables and figures are replaced.")] = None,
) -> None:  # fmt: skip
    """Run one study, or all of them."""
    wanted = STUDIES if name == "all" else (name,)
    if unknown := [n for n in wanted if n not in STUDIES]:
        raise InvalidRequest("NAME", f"there is no study {unknown[0]!r}; choose one of {', '.join(STUDIES)}, or all")
    settings = load_settings()
    bench = open_bench(settings, size, seeds, seed, threads, work)
    for each in wanted:
        run(bench, each, out, lds, page, size)


def open_bench(settings: Settings, size: str, seeds: int, seed: int, threads: int, work: Path) -> Bench:
    """Data, model and sizes. InvalidRequest for an unknown size."""
    import torch

    from byline.cli.study_files import load_data
    from byline.diffusion.model import DiffusionModel
    from byline.evaluation.study_bench import SIZES, Bench

    if size not in SIZES:
        raise InvalidRequest("--size", f"there is no size {size!r}; choose one of {', '.join(SIZES)}")
    torch.set_num_threads(threads)
    chosen = replace(SIZES[size], seeds=seeds or SIZES[size].seeds)
    report = _Reporter()
    model = DiffusionModel.load(settings.model_directory, settings.device)
    data = load_data(settings, model, chosen.encoders, report, items=chosen.items, queries=chosen.queries)
    return Bench(data, model, chosen, work, report, seed)


def run(bench: Bench, name: str, out: Path, lds: Path | None, page: Path | None, size: str) -> dict[str, Any]:
    """Measure one study and leave its JSON, its figure and its tables."""
    import importlib
    from dataclasses import asdict

    from byline.evaluation.result_file import git_commit, write_result
    from byline.evaluation.study_report import put_block

    started = time.monotonic()
    module = importlib.import_module(f"byline.evaluation.study_{name}")
    found: dict[str, Any] = module.measure(bench, lds) if name == "teachers" else module.measure(bench)
    found |= {"study": name, "size": {"name": size, **asdict(bench.size)}, "data": bench.data.digest,
              "teacher_id": bench.data.teacher_id, "judged_on_disjoint_noise": bench.data.disjoint}  # fmt: skip
    target = out / f"{name}.json"
    write_result(target, found, command=" ".join(["byline", *sys.argv[1:]]), seconds=time.monotonic() - started,
                 commit=git_commit(repository_root()), seed=bench.seed)  # fmt: skip
    text = module.markdown(found)
    typer.echo(f"\n{module.TITLE}\n\n{text}\n\nwritten to {target}")
    if module.draw(found, target.with_suffix(".png")):
        typer.echo(f"drawn to {target.with_suffix('.png')}")
    if page is not None:
        figure = page.parent / "figures" / f"study-{name}.png"
        link = f"\n\n![{module.TITLE}]({figure.relative_to(page.parent)})" if module.draw(found, figure) else ""
        if put_block(page, name, text + link):
            typer.echo(f"tables of {page} replaced, figure in {figure}")
    return found


class _Reporter:
    """Prints how far a stage is, at most every ``_EVERY`` seconds."""

    def __init__(self) -> None:
        self._said = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._said >= _EVERY:
            self._said = now
            typer.echo(f"{what}: {done} of {total}")
