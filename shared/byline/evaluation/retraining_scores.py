"""Scores of every teacher and variant on a study, each computed once and kept: what retrainings are compared with.

Why it exists: rows of retrainings and scores of teachers meet only in a product, so a new variant is judged in an
instant by retrainings made before it existed. Layer selections, dampings and curvatures of the first-order teacher
differ in the query's direction alone: one pass of gradients over the corpus per aggregation gives them all.

A variant is named by what it is: ``abu_plus_linear all 0.1 sum`` (teacher, layers, damping, aggregation), or the
teacher's registered name alone where there is nothing to choose.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from byline.diffusion.model import DiffusionModel
from byline.errors import ModelNotUsable, TeacherNotUsable
from byline.evaluation.retraining_study import Study
from byline.teachers.curvature import Curvature
from byline.teachers.diagonal_fisher import DiagonalFisher, fit_diagonal_fisher
from byline.teachers.files import TeacherFiles, curvature_name, fisher_name
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.layers import SELECTIONS, select_layers
from byline.teachers.natural_gradient import UnlearningSettings, query_gradients
from byline.teachers.preconditioner import NoCurvature, Preconditioner
from byline.teachers.ranking import TeacherQuery
from byline.teachers.registry import Fitting, ensure_curvature, load_ready_teacher

log = logging.getLogger(__name__)
DoubleArray = np.ndarray[Any, np.dtype[np.float64]]
#: Stage name, done, total.
Report = Callable[[str, int, int], None]

#: The first-order teachers and their curvature; the plain gradient has no damping.
FIRST_ORDER = ("abu_plus_linear", "abu_linear", "gradient_linear")


@dataclass(frozen=True)
class ScoreSettings:
    """Draws and samples of the scores; the variants asked for.

    Items have one common noise: a fixed set of draws is worth more draws where only the order counts (C3).
    """

    query_draws: int = 256
    item_draws: int = 128
    replicates: int = 2
    samples: int = 4096
    selections: tuple[str, ...] = tuple(SELECTIONS)
    dampings: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0, 10.0)
    aggregations: tuple[str, ...] = ("sum", "skew", "unit")
    seed: int = 0

    def unlearning(self, corpus_size: int, aggregation: str = "sum", damping: float = 0.1) -> UnlearningSettings:
        """The teacher's settings for a corpus of this size."""
        return UnlearningSettings(
            corpus_size=corpus_size, query_draws=self.query_draws, item_draws=self.item_draws, damping=damping,
            replicates=self.replicates, seed=self.seed + 1, noise="shared",
            aggregation=aggregation,  # type: ignore[arg-type]
        )  # fmt: skip


def variant(teacher: str, selection: str, damping: float, aggregation: str) -> str:
    """The name of a first-order variant."""
    kind = "" if teacher == "gradient_linear" else f" {damping:g}"
    return f"{teacher} {selection}{kind} {aggregation}"


class ScoreBook:
    """tau [q, n] of every variant of one study, kept below ``study.directory / scores`` by settings."""

    def __init__(self, study: Study, settings: ScoreSettings, report: Report = lambda stage, done, total: None) -> None:
        """Nothing is computed."""
        self.study, self.settings = study, settings
        digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode()).hexdigest()[:8]
        self.directory = study.directory / "scores" / digest
        self.files = TeacherFiles(study.directory / "teachers")
        self._report = report

    @cached_property
    def model(self) -> DiffusionModel:
        """The study's base model."""
        return self.study.model()

    def names(self) -> list[str]:
        """Variants that are there."""
        return sorted(json.loads(p.read_text())["name"] for p in self.directory.glob("*.json"))

    def get(self, name: str) -> DoubleArray:
        """tau [q, n] of a variant. TeacherNotUsable when it has not been scored."""
        path = self._path(name)
        if not path.exists():
            raise TeacherNotUsable(f"{name!r} has not been scored on this study; there are: {', '.join(self.names())}")
        tau: DoubleArray = np.load(path)
        return tau

    def put(self, name: str, tau: DoubleArray) -> None:
        """Keep tau [q, n] of a variant."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self._path(name)
        with path.with_suffix(".partial").open("wb") as handle:
            np.save(handle, tau.astype(np.float64))
        path.with_suffix(".partial").replace(path)
        path.with_suffix(".json").write_text(json.dumps({"name": name}) + "\n")

    def has(self, name: str) -> bool:
        """Whether a variant has been scored."""
        return self._path(name).with_suffix(".json").exists()

    def ensure(self, teachers: Sequence[str]) -> dict[str, str]:
        """Score the registered ``teachers`` in all their variants; returns those that cannot run, with the reason."""
        skipped: dict[str, str] = {}
        if set(teachers) & set(FIRST_ORDER):
            for aggregation in self.settings.aggregations:
                self.first_order(aggregation)
        for name in teachers:
            if name in FIRST_ORDER or self.has(name):
                continue
            try:
                self.put(name, self.registered(name))
            except (ModelNotUsable, TeacherNotUsable) as error:
                log.warning("%s is left out: %s", name, error)
                skipped[name] = str(error)
        self.simple_baselines()
        return skipped

    def registered(self, name: str, queries: Sequence[TeacherQuery] | None = None) -> DoubleArray:
        """tau [q, n] of a teacher by its registered name, fitted on the study's corpus where it needs to be."""
        teacher = load_ready_teacher(
            name, self.model, self.files, self.settings.unlearning(len(self.study.items)), lambda: self.study.items,
            fitting=Fitting(self.settings.samples, self.settings.seed), progress=self._progress(f"fit {name}"),
        )  # fmt: skip
        teacher.fit(self.study.items, progress=self._progress(f"fit {name}"))
        rankings = teacher.score_many(queries or self.study.queries, self.study.items, progress=self._progress(name))
        return np.stack([ranking.tau.astype(np.float64) for ranking in rankings])

    def first_order(self, aggregation: str) -> None:
        """All selections, dampings and curvatures of the first-order teacher with one aggregation."""
        plan = self._plan(aggregation)
        if all(self.has(name) for name in plan):
            return
        unfinished = self.directory / f"pass-{aggregation}"
        tau = self.first_order_scores(self.study.queries, aggregation, store=unfinished / "tau.npy")
        for name, scores in tau.items():
            self.put(name, scores)
        shutil.rmtree(unfinished, ignore_errors=True)

    def first_order_scores(
        self, queries: Sequence[TeacherQuery], aggregation: str, only: str | None = None, store: Path | None = None
    ) -> dict[str, DoubleArray]:
        """tau [q, n] by variant for any queries; ``only`` one of them where not all are wanted.

        A pass killed on its way goes on from ``store``.
        """
        settings = self.settings.unlearning(len(self.study.items), aggregation)
        widest = max(self.settings.selections, key=list(SELECTIONS).index)
        curvature = self.curvature(widest)
        layers = select_layers(self.model.unet, widest)
        plan = {n: v for n, v in self._plan(aggregation).items() if only in (None, n)}
        kinds = list(dict.fromkeys((teacher, damping) for teacher, _, damping in plan.values()))
        gradients = query_gradients(self.model, layers, queries, settings)
        parts = [self._preconditioner(t, widest, curvature).precondition(gradients, d) for t, d in kinds]
        stacked = {name: torch.cat([part[name] for part in parts]) for name in layers}  # [kinds * q, rows, columns]
        teacher = AbuPlusLinear(self.model, curvature, settings)
        found = teacher.layer_replicates(
            stacked, self.study.items, self._progress(f"first order, {aggregation}"), store=store
        )  # [layers, n, r, kinds * q]
        by_layer = found.mean(2).reshape(len(layers), len(self.study.items), len(kinds), len(queries))
        tau: dict[str, DoubleArray] = {}
        for name, (kind, selection, damping) in plan.items():
            inside = list(select_layers(self.model.unet, selection))
            rows = [i for i, layer in enumerate(layers) if layer in inside]
            tau[name] = by_layer[rows, :, kinds.index((kind, damping))].sum(0).T
        return tau

    def curvature(self, selection: str) -> Curvature:
        """EK-FAC factors of the study's model, fitted on its corpus."""
        return ensure_curvature(
            self.model, self.study.items, self.files.target(curvature_name(selection)), selection=selection,
            samples=self.settings.samples, seed=self.settings.seed, progress=self._progress("EK-FAC"),
        )  # fmt: skip

    def diagonal(self, selection: str) -> DiagonalFisher:
        """The diagonal Fisher matrix of the study's model, fitted on its corpus."""
        directory = self.files.find(fisher_name(selection), self.model.revision)
        if directory is not None:
            return DiagonalFisher.load(directory, self.model.revision)
        items = self.study.items
        fisher = fit_diagonal_fisher(
            self.model, self.model.encode_images([i.image for i in items]),
            self.model.encode_prompts([i.caption for i in items]), selection=selection, samples=self.settings.samples,
            seed=self.settings.seed, progress=self._progress("diagonal Fisher"),
        )  # fmt: skip
        fisher.save(self.files.target(fisher_name(selection)))
        return fisher

    def simple_baselines(self) -> None:
        """What needs no model at all: the share of caption words in common, and chance."""
        prompts, captions = ([set(text.lower().split()) for text in texts] for texts in (
            [q.prompt for q in self.study.queries], [i.caption for i in self.study.items]))
        self.put("caption words", np.array([[len(p & c) / max(1, len(p | c)) for c in captions] for p in prompts]))
        rng = np.random.default_rng([self.settings.seed, 5])
        self.put("random", rng.standard_normal((len(prompts), len(captions))))

    def _plan(self, aggregation: str) -> dict[str, tuple[str, str, float]]:
        """Variant name -> (teacher, selection, damping) of one aggregation."""
        return {
            variant(teacher, selection, damping, aggregation): (teacher, selection, damping)
            for teacher in FIRST_ORDER
            for selection in self.settings.selections
            for damping in (self.settings.dampings if teacher != "gradient_linear" else (0.0,))
        }

    def _preconditioner(self, teacher: str, selection: str, curvature: Curvature) -> Preconditioner:
        if teacher == "abu_plus_linear":
            return curvature
        if teacher == "abu_linear":
            return self.diagonal(selection)
        return NoCurvature(selection, self.model.revision)

    def _progress(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self._report(stage, done, total)

    def _path(self, name: str) -> Path:
        slug = "".join(c if c.isalnum() or c in ".-_" else "_" for c in name)
        return self.directory / f"{slug}.npy"
