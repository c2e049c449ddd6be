"""Our trainer beside the published recipe: the same pairs, the same held-out queries, one clock.

Why it exists: "twenty times faster at equal or better mAP" is a claim about two programs, so both run here, each as it
is meant to be run, and both are looked at on the way: the curve of validation mAP over time says when ours reaches
what the other ends with, and what the other has at the moment ours ends. A trainer is a function; a better student is
one more entry in the mapping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from byline.errors import LabelsNotUsable
from byline.evaluation.baselines import raw_feature_scores
from byline.evaluation.bench_rows import RowFile, Step
from byline.evaluation.map import mean_average_precision
from byline.evaluation.published_head import Look, PublishedSettings, fit_published
from byline.evaluation.stopwatch import Spent, Stopwatch
from byline.evaluation.study_student import StudentSettings, fit_student, narrowed
from byline.ranker.fit import FitConfig
from byline.ranker.labelled_set import LabelledSet

FloatArray = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Trained:
    """What a trainer returns. ``scores`` gives [q, n] for a labelled set, higher = more influential.

    ``looks``: validation mAP on the way, by what was spent until then; ``pairs`` seen in all; ``facts`` for the row.
    """

    scores: Callable[[LabelledSet], FloatArray]
    looks: tuple[Look, ...]
    pairs: int
    spent: Spent
    facts: Mapping[str, float] = field(default_factory=dict)


#: ``trainer(train, validation, seed, progress)``; times itself from the labelled sets on, with one :class:`Stopwatch`.
Trainer = Callable[[LabelledSet, LabelledSet, int, Progress], Trained]


@dataclass(frozen=True)
class BenchSets:
    """Labels of one benchmark: training queries, those that choose a step, those that judge (on other noise)."""

    train: LabelledSet
    validation: LabelledSet
    held_out: LabelledSet


def published_trainer(settings: PublishedSettings, evaluate_at: int) -> Trainer:
    """The published recipe as a trainer."""
    def run(train: LabelledSet, validation: LabelledSet, seed: int, progress: Progress) -> Trained:
        fit = fit_published(train, validation, settings, seed, evaluate_at=evaluate_at, progress=progress)
        return Trained(lambda labelled: fit.head.scores(labelled.query_features, labelled.item_features), fit.looks,
                       fit.pairs, fit.spent, {"slope": fit.slope, "bias": fit.bias})

    return run


def our_trainer(blocks: Sequence[tuple[str, int]], settings: StudentSettings, width: int = 0) -> Trainer:
    """The student of the studies as a trainer; its looks are the evaluations it stops by, and their cost counts.

    Embeddings wider than ``width`` are cut to it, as the service does (0: never).
    """
    def run(train: LabelledSet, validation: LabelledSet, seed: int, progress: Progress) -> Trained:
        watch = Stopwatch()
        at: dict[int, Spent] = {}

        def note(done: int, total: int) -> None:
            # The last call repeats the total when a fit has stopped early: the first word on a step holds.
            at.setdefault(done, watch.read())
            with watch.paused():
                progress(done, total)

        student = fit_student(train, validation, blocks, settings, seed, note)
        if 0 < width < student.report.head.config.embedding_dim:
            student = narrowed(student, width, train, validation, settings)
        spent = watch.read()
        batch = FitConfig()
        per_step = min(batch.queries_per_step, train.queries) * min(batch.items_per_step, train.items)
        history = student.report.history
        first, pairs = at.get(1, spent), history[-1].step * per_step
        looks = tuple(Look(at.get(point.step, first), point.step * per_step, point.validation_map)
                      for point in history)
        # The network alone until here; what is served (with its direct part, where it has one) is there at the end.
        looks += (Look(spent, pairs, student.report.best_map),)
        facts = {name: value for name, value in student.facts().items() if name != "fit_seconds"}
        return Trained(student.scores, looks, pairs, spent, facts)

    return run


def narrowed_trainer(trainer: Trainer, blocks: Sequence[tuple[str, int]], names: Sequence[str], share: float = 1.0,
                     ) -> Trainer:  # fmt: skip
    """``trainer`` given the columns of the encoders ``names`` only, and a ``share`` of the training queries.

    ``blocks`` are those of the labelled sets that the benchmark hands around, so that every trainer sees the same rows.
    A smaller share is part of a larger one of the same seed; validation and held-out queries are always all.
    """
    columns = columns_of(blocks, names)

    def run(train: LabelledSet, validation: LabelledSet, seed: int, progress: Progress) -> Trained:
        part = some_queries(with_columns(train, columns), share, seed)
        trained = trainer(part, with_columns(validation, columns), seed, progress)
        return replace(trained, scores=lambda labelled: trained.scores(with_columns(labelled, columns)),
                       facts={"queries": float(part.queries), "columns": float(columns.shape[0]), **trained.facts})

    return run


def columns_of(blocks: Sequence[tuple[str, int]], names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Places of the encoders ``names`` among the feature columns, in the order of ``names``."""
    starts = dict(zip((name for name, _ in blocks), np.cumsum([0, *(width for _, width in blocks)]), strict=False))
    widths = dict(blocks)
    unknown = [name for name in names if name not in widths]
    if unknown or not names:
        raise LabelsNotUsable(f"the labels come with {', '.join(widths)}, not with {', '.join(unknown) or 'nothing'}")
    return np.concatenate([starts[name] + np.arange(widths[name]) for name in names])


def with_columns(labelled: LabelledSet, columns: npt.NDArray[np.int64]) -> LabelledSet:
    """The same labels with some of the feature columns."""
    return replace(labelled, query_features=labelled.query_features[:, columns],
                   item_features=labelled.item_features[:, columns])


def some_queries(labelled: LabelledSet, share: float, seed: int) -> LabelledSet:
    """The first ``share`` of the queries in an order drawn from ``seed``, at least one."""
    if share >= 1.0:
        return labelled
    chosen = np.random.default_rng(seed).permutation(labelled.queries)[:max(1, round(share * labelled.queries))]
    error = labelled.standard_error
    return replace(labelled, query_features=labelled.query_features[chosen], tau=labelled.tau[chosen],
                   standard_error=None if error is None else error[chosen])


def chosen_pairs(train: LabelledSet, kind: str, query_mean: FloatArray, seed: int) -> LabelledSet:
    """The training labels that both trainers get: ``all``, ``nearest:K`` or ``random:M`` of each query's items.

    ``nearest`` are those by the cosine of the raw features, as curation preselects (``query_mean`` [in] centres the
    queries); ``random`` is drawn once per query. What is left out becomes "not scored", for both trainers.
    """
    if kind == "all":
        return train
    name, _, count = kind.partition(":")
    if name not in ("nearest", "random") or not count.isdigit() or not 1 < int(count):
        raise LabelsNotUsable(f"pairs are all, nearest:K or random:M with at least 2 items, not {kind!r}")
    if name == "nearest":
        keys = raw_feature_scores(train.query_features, train.item_features, query_mean=query_mean)
    else:
        keys = np.random.default_rng(seed).random(train.tau.shape, dtype=np.float32)
    keys = np.where(np.isnan(train.tau), -np.inf, keys)
    dropped = np.argsort(-keys, axis=1, kind="stable")[:, int(count):]
    tau = train.tau.copy()
    np.put_along_axis(tau, dropped, np.nan, axis=1)
    return LabelledSet(train.query_features, train.item_ids, train.item_features, tau, train.standard_error)


def measure_trainer(name: str, trainer: Trainer, sets: BenchSets, seed: int, cutoffs: Sequence[int],
                    progress: Progress) -> Step:
    """One training run as a row, and the held-out AP of every query by L as arrays ``ap_L``."""
    trained = trainer(sets.train, sets.validation, seed, progress)
    scores = trained.scores(sets.held_out)
    found = {cutoff: mean_average_precision(scores, sets.held_out.tau, cutoff) for cutoff in cutoffs}
    row: dict[str, Any] = {
        "trainer": name, "seed": seed, "seconds": trained.spent.seconds, "wall_seconds": trained.spent.wall,
        "pairs": trained.pairs, "pairs_per_second": trained.pairs / max(trained.spent.seconds, 1e-9),
        "map": {str(cutoff): result.mean for cutoff, result in found.items()},
        "standard_error": {str(cutoff): result.standard_error for cutoff, result in found.items()},
        "validation_curve": [
            {"seconds": look.spent.seconds, "wall_seconds": look.spent.wall, "pairs": look.pairs,
             "map": look.validation_map} for look in trained.looks
        ],
        **trained.facts,
    }  # fmt: skip
    return [row], {f"ap_{cutoff}": result.per_query for cutoff, result in found.items()}


def run_trainers(trainers: Mapping[str, Trainer], sets: BenchSets, seeds: Sequence[int], cutoffs: Sequence[int],
                 kept: RowFile, progress: Callable[[str, int, int], None] = lambda what, done, total: None,
                 keys: Mapping[str, str] | None = None
                 ) -> tuple[list[dict[str, Any]], dict[str, dict[int, npt.NDArray[np.float64]]]]:
    """All runs, each kept in ``kept`` once it is done: rows, and per trainer and L the AP [q] averaged over seeds.

    ``keys[name]`` says what a trainer's runs depend on: with another key they are made anew, and the others kept.
    """
    rows: list[dict[str, Any]] = []
    precisions: dict[str, dict[int, npt.NDArray[np.float64]]] = {}
    for name, trainer in trainers.items():
        found: dict[int, list[npt.NDArray[np.float64]]] = {cutoff: [] for cutoff in cutoffs}
        for seed in seeds:
            def work(name: str = name, trainer: Trainer = trainer, seed: int = seed) -> Step:
                return measure_trainer(name, trainer, sets, seed, cutoffs,
                                       lambda done, total: progress(f"{name}, seed {seed}", done, total))

            row, arrays = kept.once("-".join(part for part in (name, (keys or {}).get(name), str(seed)) if part), work)
            rows += row
            for cutoff in cutoffs:
                found[cutoff].append(arrays[f"ap_{cutoff}"])
        precisions[name] = {cutoff: np.mean(values, axis=0) for cutoff, values in found.items()}
    return rows, precisions
