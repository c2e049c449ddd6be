"""``make bench-head``: our trainer beside the published recipe; JSON and figures into ``reports/bench``.

Why it exists: ``byline.evaluation.bench_head`` does the measuring; here are the labels it is done on and the settings
of both sides. Both get the same pairs of the same labels, on several sets of features:

- the recipe as published (free slope, 4,096 pairs a step), on the kind of features it was published for;
- on every set of features with the sign of its slope kept, so that the comparison is not won by a sign, and in small
  steps, since few labels are few steps of the published size.

    python -m byline.cli.bench_head --pairs nearest:500 --passes 10

A killed run goes on behind the last trainer that finished (``--fresh`` begins anew). Run it on a quiet machine; times
are CPU seconds of the process, wall seconds stand beside them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from byline.config import load_settings, repository_root
from byline.evaluation.bench_head import (
    BenchSets,
    Trainer,
    chosen_pairs,
    narrowed_trainer,
    our_trainer,
    published_trainer,
    run_trainers,
)
from byline.evaluation.bench_head_curve import curve_figures, draw_curve, run_name
from byline.evaluation.bench_head_report import draw, figures
from byline.evaluation.bench_rows import RowFile
from byline.evaluation.head_report import report_head
from byline.evaluation.published_head import PublishedSettings
from byline.evaluation.result_file import git_commit, machine, write_result
from byline.evaluation.study_student import StudentSettings, student_digest
from byline.rankings.label_files import read_label_files
from byline.rankings.labelled import LEARN

log = logging.getLogger("bench-head")
#: A trainer, and what a run of it depends on.
Keyed = tuple[Trainer, str]
SMALL = "published, sign kept, small steps"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write the result."""
    a = _parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(a.threads)
    labels = read_label_files(a.labels, a.corpus, a.model, a.features, a.cache, progress=_Shown())
    cutoffs = tuple(dict.fromkeys([*a.cutoffs, a.evaluate_at]))
    train = labels.labelled("train")
    pairs = chosen_pairs(train, a.pairs, train.query_features.mean(0), a.seed)
    sets = BenchSets(pairs, labels.labelled("validation", cutoff=a.evaluate_at),
                     labels.labelled("test", cutoff=max(cutoffs)))
    log.info("machine %s; %d training queries, %d pairs; %d validation and %d held-out queries", machine(),
             pairs.queries, int(pairs.scored().sum()), sets.validation.queries, sets.held_out.queries)
    common = {"pairs": a.pairs, "features": labels.feature_spec, "preprocessing": labels.preprocessing_hash,
              "threads": a.threads, "cutoffs": cutoffs, "evaluate_at": a.evaluate_at, "seed": a.seed,
              "labels": _digest((a.labels / "labels.json").read_bytes())}  # fmt: skip
    ours, theirs = _our_trainers(a, labels.blocks), _published_trainers(a, labels.blocks)
    curve = [*list(ours)[:2], list(theirs)[-1]] if a.shares else []
    every = {name: keyed[0] for name, keyed in (ours | theirs).items()}
    # A run is kept by what it depends on: another student of ours does not make the published recipe run again.
    keys = {name: keyed[1] for name, keyed in (ours | theirs).items()}
    for name in curve:
        for share in a.shares if name in ours else a.published_shares:
            part = run_name(name, share)
            every[part] = narrowed_trainer(every[name], labels.blocks, [n for n, _ in labels.blocks], share)
            keys[part] = keys[name]
    folder = a.out / f"head-{_key(common)}"
    if a.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    kept = RowFile(folder)
    wanted = [name for name in every if not a.only or any(part in name for part in a.only)]
    rows, precisions = run_trainers({name: every[name] for name in wanted}, sets,
                                    range(a.seed, a.seed + a.seeds), cutoffs, kept, _Shown(), keys)
    if a.only:
        log.info("kept %d runs in %s; without --only they are read from there", len(rows), folder)
        return
    other = labels.labelled("test", LEARN, max(cutoffs)).tau if labels.disjoint("test") else None
    # The rows of the head itself are not used: any scores do, and these are at hand without training again.
    reports = {cutoff: report_head(sets.held_out.tau, sets.held_out, train, list(labels.blocks), cutoff=cutoff,
                                   other_half=other, seed=a.seed) for cutoff in cutoffs}  # fmt: skip
    result = figures(rows, precisions, reports, ours=list(ours), published=list(theirs), main_cutoff=a.evaluate_at,
                     seed=a.seed)
    learning = curve_figures(rows, precisions, curve, [*a.shares, *a.published_shares])
    path = a.out / "head.json"
    settings = common | {"ours": _student(a).facts(), "width": a.width, "published": asdict(_recipe(a)),
                         "small_batch": a.small_batch, "small_passes": a.small_passes}  # fmt: skip
    write_result(path, {**result, "learning_curve": learning, "settings": settings}, command=_command(argv),
                 seconds=kept.seconds, commit=git_commit(repository_root()), seed=a.seed)
    drawn = draw(result, path.with_suffix(".png"))
    if curve:
        draw_curve(learning, result["by_L"], path.with_name("head-curve.png"))
    log.info("%s against %s: time ratio %.1f, mAP(%d) %.3f against %.3f", *result["compared"].values(),
             result["time_ratio"], a.evaluate_at, result["map"]["ours"], result["map"]["published"])
    log.info("wrote %s%s", path, "" if drawn else "; no figure, as matplotlib is not installed")


def _student(a: argparse.Namespace) -> StudentSettings:
    return StudentSettings(loss=a.loss, hidden=tuple(a.hidden), out_dim=a.out_dim, evaluate_at=a.evaluate_at,
                           max_steps=a.steps)


def _recipe(a: argparse.Namespace) -> PublishedSettings:
    return PublishedSettings(passes=a.passes, batch=a.batch, look_every=a.look_every, width=a.tower)


def _our_trainers(a: argparse.Namespace, blocks: tuple[tuple[str, int], ...]) -> dict[str, Keyed]:
    student, widths = _student(a), dict(blocks)
    found: dict[str, Keyed] = {}
    for spec in a.ours:
        names = spec.split("+")
        mine = our_trainer([(name, widths.get(name, 0)) for name in names], student, a.width)
        key = _key({**student.facts(), "width": a.width, "code": student_digest()})
        found[f"ours, {spec}"] = narrowed_trainer(mine, blocks, names), key
    return found


def _published_trainers(a: argparse.Namespace, blocks: tuple[tuple[str, int], ...]) -> dict[str, Keyed]:
    """The first of ``--published`` as published too, all of them in the variant that does better with few labels."""
    recipe = _recipe(a)
    small = replace(recipe, slope=-1.0, constrained=True, batch=a.small_batch, passes=a.small_passes,
                    look_every=a.look_every * max(1, a.batch // a.small_batch))
    found: dict[str, Keyed] = {}
    for place, spec in enumerate(a.published):
        variants = {"published": recipe} if place == 0 else {}
        for variant, settings in (variants | {SMALL: small}).items():
            trainer = narrowed_trainer(published_trainer(settings, a.evaluate_at), blocks, spec.split("+"))
            found[f"{variant}, {spec}"] = trainer, _key(asdict(settings))
    return found


class _Shown:
    """Progress as a log line every ten seconds."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if time.monotonic() - self._said >= 10:
            self._said = time.monotonic()
            log.info("%s: %d of %d", what, done, total)


def _key(facts: Mapping[str, object]) -> str:
    return _digest(json.dumps(facts, sort_keys=True).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    settings = load_settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="nearest:500", help="labels both learn from: all, nearest:K or random:M")
    parser.add_argument("--seeds", type=int, default=1, help="how many runs of each trainer")
    parser.add_argument("--ours", nargs="+", metavar="SPEC", help="features of our students, the first the headline",
                        default=["minilm+gradient", "minilm+denoiser", "efficientnet_lite0+minilm"])
    parser.add_argument("--published", nargs="+", metavar="SPEC", help="features of the recipe, its own first",
                        default=["efficientnet_lite0+minilm", "minilm+denoiser", "minilm+gradient"])
    parser.add_argument("--shares", type=float, nargs="*", default=[0.125, 0.25, 0.5],
                        help="of the training queries, for our learning curves")
    parser.add_argument("--published-shares", type=float, nargs="*", default=[0.125, 0.25], help="and for the recipe's")
    parser.add_argument("--only", nargs="+", help="make only runs whose name holds one of these, and no result")
    parser.add_argument("--passes", type=int, default=1, help="over all pairs, of the recipe as published; it says 10")
    parser.add_argument("--small-passes", type=int, default=2, help="and in small steps")
    parser.add_argument("--batch", type=int, default=4096, help="pairs in a step of the published recipe")
    parser.add_argument("--small-batch", type=int, default=512, help="and in a small step")
    parser.add_argument("--tower", type=int, default=768, help="width of the published tower")
    parser.add_argument("--look-every", type=int, default=4, help="its full steps between two points of the curve")
    parser.add_argument("--width", type=int, default=settings.trainer_width, help="of our embeddings, at most")
    parser.add_argument("--loss", default="listwise")
    parser.add_argument("--steps", type=int, default=StudentSettings.max_steps, help="of ours, at most")
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 512])
    parser.add_argument("--out-dim", type=int, default=512)
    parser.add_argument("--evaluate-at", type=int, default=100, help="L of the validation mAP and of the headline")
    parser.add_argument("--cutoffs", type=int, nargs="+", default=[20, 100, 500], help="every L that is reported")
    parser.add_argument("--features", default="efficientnet_lite0+minilm+denoiser+gradient",
                        help="all that any trainer needs, extracted at once")
    parser.add_argument("--labels", type=Path, default=settings.labels_dir)
    parser.add_argument("--corpus", type=Path, default=settings.corpus_source)
    parser.add_argument("--model", type=Path, default=settings.model_directory)
    parser.add_argument("--cache", type=Path, default=settings.cache_dir)
    parser.add_argument("--out", type=Path, default=repository_root() / "reports/bench")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="forget the runs of this configuration")
    return parser.parse_args(argv)


def _command(argv: Sequence[str] | None) -> str:
    given = sys.argv[1:] if argv is None else list(argv)
    return "make bench-head" if not given else "python -m byline.cli.bench_head " + " ".join(given)


if __name__ == "__main__":
    main()
