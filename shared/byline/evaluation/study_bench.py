"""A study's workbench: sizes, rows kept by what they depend on, and heads judged query by query.

Why it exists: a study is a grid of fits. Each cell of it is one row on disk under a digest of everything it depends on
(data, student's code, settings, seed), so that a killed study goes on, studies share cells, and two cells are compared
on the same held-out queries by the paired bootstrap.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from byline.diffusion.model import DiffusionModel
from byline.evaluation.bootstrap import PairedDifference, paired_bootstrap
from byline.evaluation.kept_rows import KeptRows
from byline.evaluation.map import mean_average_precision
from byline.evaluation.recall import recall_at
from byline.evaluation.study_data import JUDGE, LEARN, Progress, StudyData
from byline.evaluation.study_student import Student, StudentSettings, fit_student, student_digest
from byline.ranker.head import DIRECT
from byline.ranker.labelled_set import LabelledSet

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Row = dict[str, Any]


@dataclass(frozen=True)
class StudySize:
    """How much a study looks at; ``items`` and ``queries`` per split of the data are 0 for all.

    Grids that count items are shares of the corpus. ``draws`` and ``teacher_*`` are of the labels the study of
    teachers makes by itself.
    """

    items: int = 0
    queries: int = 0
    encoders: tuple[str, ...] = ("efficientnet_lite0", "minilm", "denoiser", "gradient")
    #: The two heads that the other studies look at: one that only its labels teach, and the one that is served.
    network: tuple[str, ...] = ("minilm", "denoiser")
    served: tuple[str, ...] = ("minilm", "gradient")
    fused: tuple[tuple[str, ...], ...] = (
        ("efficientnet_lite0", "minilm"), ("minilm", "denoiser"), ("minilm", "gradient"),
        ("efficientnet_lite0", "minilm", "denoiser", "gradient"),
    )
    cutoffs: tuple[int, ...] = (20, 100, 500)
    seeds: int = 1
    student: StudentSettings = StudentSettings()
    #: A loss whose scale is the ranking's own, beside the student's: how few candidates teach depends on it.
    rank_loss: str = "bce_rank"
    nearest: tuple[float, ...] = (0.025, 0.05, 0.1, 0.2, 0.4)
    candidates: tuple[float, ...] = (0.025, 0.1, 0.4)
    exploration: tuple[float, ...] = (0.0, 0.1)
    dimensions: tuple[int, ...] = (768, 512, 384, 256, 128, 64)
    separate: tuple[int, ...] = (256, 64)
    timing_items: int = 100_000
    timing_rounds: int = 60
    query_shares: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1)
    budget_shares: tuple[float, ...] = (1.0, 0.1)
    negatives: tuple[float, ...] = (0.0, 0.1, 0.3)
    teacher_items: int = 300
    teacher_queries: tuple[int, int, int] = (60, 12, 30)
    draws: int = 32
    query_draws: int = 48
    curvature_samples: int = 512


SIZES = {
    "demo": StudySize(),
    "fuller": StudySize(seeds=5, separate=(512, 384, 256, 128, 64), timing_rounds=300,
                        candidates=(0.025, 0.05, 0.1, 0.2, 0.4), exploration=(0.0, 0.1, 0.3),
                        budget_shares=(1.0, 0.5, 0.25, 0.1), negatives=(0.0, 0.05, 0.1, 0.2, 0.5),
                        teacher_items=2509, teacher_queries=(298, 34, 68), draws=128, query_draws=256,
                        curvature_samples=4096, timing_items=1_000_000),
    "tiny": StudySize(
        items=48, queries=8, encoders=("minilm", "denoiser", "gradient"), cutoffs=(3, 6, 12), seeds=2,
        fused=(("minilm", "denoiser"), ("minilm", "gradient")),
        student=StudentSettings(hidden=(16,), out_dim=16, evaluate_at=6, max_steps=4), nearest=(0.25, 0.5),
        candidates=(0.25, 0.5), exploration=(0.0, 0.5), dimensions=(16, 8), separate=(8,), timing_items=200,
        timing_rounds=5, query_shares=(1.0, 0.5), budget_shares=(1.0, 0.5), negatives=(0.0, 0.5), teacher_items=24,
        teacher_queries=(4, 2, 3), draws=8, query_draws=8, curvature_samples=32,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One way to order items, judged on held-out queries: ``values`` by measure, each [seeds, q]."""

    name: str
    values: Mapping[str, npt.NDArray[np.float64]]
    facts: tuple[Mapping[str, float], ...] = ()

    def mean(self, measure: str) -> float:
        """Over seeds and queries."""
        return float(self.values[measure].mean())

    def error(self, measure: str) -> float:
        """Standard error over queries of the mean over seeds (population deviation, as mAP's)."""
        per_query = self.values[measure].mean(0)
        return float(per_query.std() / np.sqrt(len(per_query)))

    def seed_error(self, measure: str) -> float | None:
        """Standard error over seeds; None for one."""
        seeds = self.values[measure].mean(1)
        return None if len(seeds) < 2 else float(seeds.std(ddof=1) / np.sqrt(len(seeds)))

    def fact(self, name: str) -> float:
        """Mean over the fits of one of their facts, such as ``validation_map``."""
        return float(np.mean([facts[name] for facts in self.facts]))

    def minus(self, other: Cell, measure: str, seed: int = 0) -> PairedDifference:
        """This less ``other`` on the same queries, paired bootstrap of the means over seeds."""
        return paired_bootstrap(self.values[measure].mean(0), other.values[measure].mean(0), seed=seed)

    def to_json(self) -> Row:
        """Means, errors and the mean of each fact."""
        out: Row = {"name": self.name, "seeds": len(next(iter(self.values.values())))}
        for measure in self.values:
            out[measure] = {"mean": self.mean(measure), "error": self.error(measure),
                            "seed_error": self.seed_error(measure)}  # fmt: skip
        for fact in self.facts[0] if self.facts else ():
            out[fact] = self.fact(fact)
        return out


@dataclass(frozen=True)
class Fit:
    """One fit of a grid. ``queries`` of the training split (0: all), first by a seeded order; ``candidates`` items each
    (0: all), chosen by ``choice``: ``nearest`` by the same encoders (``Bench.nearness``) but for an ``explored`` share
    of them drawn from the rest, or ``uniform``. What is drawn is drawn by the fit's own seed."""

    student: StudentSettings
    encoders: tuple[str, ...]
    queries: int = 0
    candidates: int = 0
    choice: str = "nearest"
    explored: float = 0.0


@dataclass(frozen=True)
class Bench:
    """Everything a study needs. ``work`` keeps rows and fitted things."""

    data: StudyData
    model: DiffusionModel
    size: StudySize
    work: Path
    report: Progress
    seed: int = 0

    @cached_property
    def rows(self) -> KeptRows:
        """Rows of all studies."""
        return KeptRows(self.work / "rows.jsonl")

    @property
    def seeds(self) -> range:
        """Seeds of the fits."""
        return range(self.seed, self.seed + self.size.seeds)

    @property
    def student(self) -> StudentSettings:
        """The student that nothing is changed of."""
        return self.size.student

    @cached_property
    def _common(self) -> str:
        return f"{self.data.digest}/{student_digest()}/{self.size.cutoffs}"

    def row(self, facts: Mapping[str, object], make: Callable[[], Row]) -> Row:
        """The row kept under ``facts``, made where it is not there."""
        text = json.dumps(facts, sort_keys=True, default=str)
        key = hashlib.sha256(f"{self._common}/{text}".encode()).hexdigest()[:24]
        kept = self.rows.get(key)
        if kept is None:
            kept = make() | {"facts": json.loads(text)}
            self.rows.put(key, kept)
        return kept

    @property
    def arms(self) -> dict[str, Fit]:
        """The heads whose labels are varied: the network under both losses, and the one that is served."""
        size, student = self.size, self.student
        fits = [Fit(replace(student, loss=size.rank_loss), size.network), Fit(student, size.network),
                Fit(student, size.served)]  # fmt: skip
        return {f"{'+'.join(fit.encoders)}, {fit.student.loss}": fit for fit in fits}

    # -- judging ----------------------------------------------------------------------------------

    @cached_property
    def held_out(self) -> LabelledSet:
        """The test queries by the noise half that nothing learns from, over all encoders."""
        return self.data.labelled(self.data.rows("test"), JUDGE)

    def test_set(self, encoders: Sequence[str]) -> LabelledSet:
        """``held_out`` with some encoders' features."""
        return self.data.labelled(self.data.rows("test"), JUDGE, encoders)

    def judge(self, scores: FloatArray, tau: FloatArray) -> dict[str, list[float]]:
        """Per held-out query: mAP(L) for every cut-off, ``top1`` (the teacher's first is first) and ``recall``
        (the teacher's top L, of the middle cut-off, inside the first 4 L)."""
        middle = self.size.cutoffs[len(self.size.cutoffs) // 2]
        found = {f"map{cut}": mean_average_precision(scores, tau, cut).per_query for cut in self.size.cutoffs}
        found["top1"] = recall_at(scores, tau, 1, 1)
        found["recall"] = recall_at(scores, tau, middle, 4 * middle)
        return {name: [round(float(v), 6) for v in values] for name, values in found.items()}

    def cell(self, name: str, scores: FloatArray) -> Cell:
        """A way to order items that needs no fit."""
        judged = self.judge(scores, self.held_out.tau)
        return Cell(name, {m: np.asarray([v], dtype=np.float64) for m, v in judged.items()})

    def fitted(self, name: str, fit: Fit) -> Cell:
        """A head judged on the test queries, over all seeds."""
        return cell_of(name, self.fitted_rows(name, fit))

    def fitted_rows(self, name: str, fit: Fit) -> list[Row]:
        """A row for every seed: ``judged`` on the test queries, ``validation`` on those that choose."""
        rows = []
        for number, seed in enumerate(self.seeds):
            self.report(f"head: {name}", number, len(self.seeds))
            rows.append(self.row({"fit": asdict(fit), "seed": seed}, lambda seed=seed: self._fit_row(fit, seed)))  # type: ignore[misc]
        self.report(f"head: {name}", len(self.seeds), len(self.seeds))
        return rows

    def fit(self, fit: Fit, seed: int) -> Student:
        """One fit of the grid, from one noise half of the labels."""
        train, validation = self.training_set(fit, seed), self.validation_set(fit.encoders)
        return fit_student(train, validation, self.data.blocks_of(fit.encoders), fit.student, seed)

    def validation_set(self, encoders: Sequence[str]) -> LabelledSet:
        """What decides when a fit stops, and how its parts are blended."""
        return self.data.labelled(self.data.rows("validation"), JUDGE, encoders)

    def training_set(self, fit: Fit, seed: int) -> LabelledSet:
        """The labels a fit learns from: some of the training queries, some items of each."""
        rows = self.data.rows("train")
        if fit.queries:
            rows = np.sort(np.random.default_rng([seed, 1]).permutation(rows)[: fit.queries])
        train = self.data.labelled(rows, LEARN, fit.encoders)
        if not fit.candidates or fit.candidates >= train.items:
            return train
        chosen = choose(self.nearness(rows, fit.encoders), fit, np.random.default_rng([seed, 2]))
        return replace(train, tau=np.where(chosen, train.tau, np.nan).astype(np.float32))

    def nearness(self, rows: IntArray, encoders: Sequence[str]) -> FloatArray:
        """What curation's shortlist goes by, [q, n]: the inner product of an encoder whose inner product estimates
        influence where there is one, else the raw cosine of the features, standardised by the items."""
        from byline.evaluation.baselines import raw_feature_scores

        direct = [name for name in encoders if name in DIRECT]
        if direct:
            columns = self.data.columns(direct[:1])
            return self.data.query_features[np.ix_(rows, columns)] @ self.data.item_features[:, columns].T
        columns = self.data.columns(encoders)
        return raw_feature_scores(self.data.query_features[np.ix_(rows, columns)], self.data.item_features[:, columns])

    def _fit_row(self, fit: Fit, seed: int) -> Row:
        student = self.fit(fit, seed)
        validation = self.validation_set(fit.encoders)
        return {"judged": self.judge(student.scores(self.test_set(fit.encoders)), self.held_out.tau),
                "validation": self.judge(student.scores(validation), validation.tau),
                "facts_of_fit": student.facts()}  # fmt: skip


def cell_of(name: str, rows: Sequence[Row], part: str = "judged") -> Cell:
    """The rows of one configuration's seeds as a cell."""
    values = {m: np.asarray([row[part][m] for row in rows], dtype=np.float64) for m in rows[0][part]}
    return Cell(name, values, tuple(row["facts_of_fit"] for row in rows))


def choose(nearness: FloatArray, fit: Fit, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """[q, n]: the items a fit has labels of, ``fit.candidates`` a query; ties by position."""
    chosen = np.zeros(nearness.shape, dtype=bool)
    explored = round(fit.candidates * fit.explored)
    for row, values in enumerate(nearness):
        if fit.choice == "uniform":
            chosen[row, rng.choice(len(values), size=fit.candidates, replace=False)] = True
            continue
        order = np.argsort(-values, kind="stable")
        near = fit.candidates - explored
        chosen[row, order[:near]] = True
        if explored:
            chosen[row, rng.choice(order[near:], size=explored, replace=False)] = True
    return chosen
