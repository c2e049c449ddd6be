"""``make bench-head``: our trainer beside the published recipe; JSON and figure into ``reports/bench``.

Why it exists: ``byline.evaluation.bench_head`` does the measuring; here are the labels it is done on and the settings
of both sides.

    python -m byline.cli.bench_head --pairs nearest:500 --seeds 1

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
    our_trainer,
    published_trainer,
    run_trainers,
)
from byline.evaluation.bench_head_report import draw, figures
from byline.evaluation.bench_rows import RowFile
from byline.evaluation.head_report import report_head
from byline.evaluation.published_head import PublishedSettings
from byline.evaluation.result_file import git_commit, machine, write_result
from byline.evaluation.study_student import StudentSettings, student_digest
from byline.rankings.label_files import read_label_files
from byline.rankings.labelled import LEARN

log = logging.getLogger("bench-head")
OURS, PUBLISHED, SIGNED = "ours", "published", "published, sign kept"


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
    recipe = PublishedSettings(passes=a.passes, batch=a.batch, look_every=a.look_every, width=a.width)
    student = StudentSettings(loss=a.loss, hidden=tuple(a.hidden), out_dim=a.out_dim, evaluate_at=a.evaluate_at,
                              max_steps=a.steps)
    signed = replace(recipe, slope=-1.0, constrained=True)
    common = {"pairs": a.pairs, "features": labels.feature_spec, "preprocessing": labels.preprocessing_hash,
              "threads": a.threads, "cutoffs": cutoffs, "evaluate_at": a.evaluate_at, "seed": a.seed,
              "labels": _digest((a.labels / "labels.json").read_bytes())}  # fmt: skip
    trainers: dict[str, Trainer] = {
        OURS: our_trainer(labels.blocks, student), PUBLISHED: published_trainer(recipe, a.evaluate_at),
        SIGNED: published_trainer(signed, a.evaluate_at),
    }  # fmt: skip
    # A run is kept by what it depends on: another student of ours does not make the published recipe run again.
    keys = {OURS: _key({**student.facts(), "code": student_digest()}), PUBLISHED: _key(asdict(recipe)),
            SIGNED: _key(asdict(signed))}  # fmt: skip
    folder = a.out / f"head-{_key(common)}"
    if a.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    kept = RowFile(folder)
    rows, precisions = run_trainers({name: trainers[name] for name in trainers if a.signed or name != SIGNED}, sets,
                                    range(a.seed, a.seed + a.seeds), cutoffs, kept, _Shown(), keys)
    other = labels.labelled("test", LEARN, max(cutoffs)).tau if labels.disjoint("test") else None
    # The rows of the head itself are not used: any scores do, and these are at hand without training again.
    reports = {cutoff: report_head(sets.held_out.tau, sets.held_out, train, list(labels.blocks), cutoff=cutoff,
                                   other_half=other, seed=a.seed) for cutoff in cutoffs}  # fmt: skip
    result = figures(rows, precisions, reports, ours=OURS, published=PUBLISHED, main_cutoff=a.evaluate_at, seed=a.seed)
    path = a.out / "head.json"
    settings = common | {"ours": student.facts(), "published": asdict(recipe)}
    write_result(path, {**result, "settings": settings}, command=_command(argv), seconds=kept.seconds,
                 commit=git_commit(repository_root()), seed=a.seed)
    drawn = draw(result, path.with_suffix(".png"))
    log.info("time ratio %.1f, mAP(%d) ours %.3f, published %.3f", result["time_ratio"], a.evaluate_at,
             result["map"]["ours"], result["map"]["published"])
    log.info("wrote %s%s", path, "" if drawn else "; no figure, as matplotlib is not installed")


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
    parser.add_argument("--signed", action=argparse.BooleanOptionalAction, default=True,
                        help="also the published recipe with the sign of its slope kept")
    parser.add_argument("--passes", type=int, default=10, help="of the published recipe over all pairs")
    parser.add_argument("--batch", type=int, default=4096, help="pairs in a step of the published recipe")
    parser.add_argument("--width", type=int, default=768, help="of the published tower")
    parser.add_argument("--look-every", type=int, default=10, help="its steps between two points of the curve")
    parser.add_argument("--loss", default="listwise")
    parser.add_argument("--steps", type=int, default=StudentSettings.max_steps, help="of ours, at most")
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 512])
    parser.add_argument("--out-dim", type=int, default=512)
    parser.add_argument("--evaluate-at", type=int, default=100, help="L of the validation mAP and of the headline")
    parser.add_argument("--cutoffs", type=int, nargs="+", default=[20, 100, 200, 500], help="every L that is reported")
    parser.add_argument("--features", default=settings.feature_spec)
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
