"""Scores of every teacher and variant on a study, each computed once and kept: what retrainings are compared with.

Why it exists: rows of retrainings and scores of teachers meet only in a product, so a new variant is judged in an
instant by retrainings made before it existed. Layer selections, dampings, curvatures and kernels are all products with
the same item gradients (``retraining_gradients``): one pass over the corpus per aggregation and objective gives them.

A variant is named by what it is: ``abu_plus_linear all 0.1 sum`` (teacher, layers, damping, form), ``trak all 0.1``, or
the teacher's registered name alone where there is nothing to choose. The kernel teachers are computed here without a
random projection, as the limit of many dimensions; damping is relative to the mean eigenvalue of the items' Gram
matrix.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from byline.diffusion.model import DiffusionModel
from byline.errors import ModelNotUsable, TeacherNotUsable
from byline.evaluation.retraining_gradients import StoredGradients, store_gradients
from byline.evaluation.retraining_study import Study
from byline.teachers.curvature import Curvature
from byline.teachers.diagonal_fisher import DiagonalFisher, fit_diagonal_fisher
from byline.teachers.files import TeacherFiles, curvature_name, fisher_name
from byline.teachers.item_gradients import Objective
from byline.teachers.layers import SELECTIONS, EditableLayer, select_layers
from byline.teachers.natural_gradient import UnlearningSettings, query_gradients
from byline.teachers.preconditioner import NoCurvature, Preconditioner
from byline.teachers.ranking import TeacherQuery
from byline.teachers.recipes import Fitting
from byline.teachers.registry import ensure_curvature, load_ready_teacher

log = logging.getLogger(__name__)
DoubleArray = np.ndarray[Any, np.dtype[np.float64]]
#: Stage name, done, total.
Report = Callable[[str, int, int], None]

#: The first-order teachers and their curvature; the plain gradient has no damping.
FIRST_ORDER = ("abu_plus_linear", "abu_linear", "gradient_linear")
#: How an item's gradient is made: the loss, aggregated over timesteps, or D-TRAK's function in its place.
Form = Literal["sum", "skew", "unit", "output_norm"]
FORMS: dict[str, Form] = {"sum": "sum", "skew": "skew", "unit": "unit", "output_norm": "output_norm"}
#: What needs no teacher.
SIMPLE = ("random", "caption words")
#: The kernel teachers and whose gradient they project.
KERNELS: dict[str, Form] = {"trak": "sum", "d_trak": "output_norm"}


@dataclass(frozen=True)
class ScoreSettings:
    """Draws and samples of the scores; the variants asked for.

    Items have one common noise: a fixed set of draws is worth more draws where only the order counts (C3).
    """

    query_draws: int = 256
    item_draws: int = 64
    replicates: int = 2
    samples: int = 4096
    selections: tuple[str, ...] = tuple(SELECTIONS)
    dampings: tuple[float, ...] = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)
    forms: tuple[Form, ...] = ("sum", "skew", "unit", "output_norm")
    seed: int = 0

    def unlearning(self, corpus_size: int) -> UnlearningSettings:
        """The draws of a teacher for a corpus of this size."""
        return UnlearningSettings(
            corpus_size=corpus_size, query_draws=self.query_draws, item_draws=self.item_draws,
            replicates=self.replicates, seed=self.seed + 1, noise="shared",
        )  # fmt: skip


def variant(teacher: str, selection: str, damping: float, form: Form) -> str:
    """The name of a first-order variant."""
    kind = "" if teacher == "gradient_linear" else f" {damping:g}"
    return f"{teacher} {selection}{kind} {form}"


def _short(*facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]


def _objective(form: Form) -> Objective:
    return "output_norm" if form == "output_norm" else "denoising"


class ScoreBook:
    """tau [q, n] of every variant on one study's queries, kept beside them by settings."""

    def __init__(self, study: Study, settings: ScoreSettings, report: Report = lambda stage, done, total: None) -> None:
        """Nothing is computed."""
        self.study, self.settings = study, settings
        self.count = len(study.items)
        of_items = (settings.item_draws, settings.replicates, settings.seed, self.widest)
        self._gradient_directory = study.directory / "gradients" / _short(*of_items)
        self.directory = study.query_directory / f"scores-{_short(*of_items, settings.query_draws, settings.samples)}"
        self.files = TeacherFiles(study.directory / "teachers")
        self._report = report

    @cached_property
    def model(self) -> DiffusionModel:
        """The study's base model."""
        return self.study.model()

    @cached_property
    def widest(self) -> str:
        """The selection that holds all others asked for."""
        return max(self.settings.selections, key=list(SELECTIONS).index)

    @cached_property
    def layers(self) -> dict[str, EditableLayer]:
        """The widest selection's layers."""
        return select_layers(self.model.unet, self.widest)

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
        names = ["random"]
        for teacher in teachers:
            if teacher in FIRST_ORDER:
                names += [name for form in self.settings.forms for name in self._plan(form)]
            else:
                names += list(self._kernel_plan(teacher)) if teacher in KERNELS else [teacher]
        return self.ensure_variants(names)

    def ensure_variants(self, names: Sequence[str]) -> dict[str, str]:
        """Score the variants ``names`` (and whatever falls out on the way); returns those that cannot run."""
        skipped: dict[str, str] = {}
        for name in names:
            if self.has(name):
                continue
            try:
                for made, tau in self._score(name).items():
                    self.put(made, tau)
            except (ModelNotUsable, TeacherNotUsable) as error:
                log.warning("%s is left out: %s", name, error)
                skipped[name] = str(error)
        return skipped

    def _score(self, name: str) -> dict[str, DoubleArray]:
        """tau of a variant and of all that come with it."""
        teacher, form = name.split(" ")[0], name.rpartition(" ")[2]
        if name in SIMPLE:
            return self.simple_baselines()
        if teacher in FIRST_ORDER and form in FORMS and name in self._plan(FORMS[form]):
            return self.first_order_scores(self.study.queries, FORMS[form])
        if teacher in KERNELS and name in self._kernel_plan(teacher):
            return self.kernel_scores(self.study.queries, teacher)
        return {name: self.registered(name)}

    def registered(self, name: str, queries: Sequence[TeacherQuery] | None = None) -> DoubleArray:
        """tau [q, n] of a teacher by its registered name, fitted on the study's corpus where it needs to be."""
        teacher = load_ready_teacher(
            name, self.model, self.files, self.settings.unlearning(self.count), lambda: self.study.items,
            fitting=Fitting(self.settings.samples, self.settings.seed), progress=self._progress(f"fit {name}"),
        )  # fmt: skip
        teacher.fit(self.study.items, progress=self._progress(f"fit {name}"))
        rankings = teacher.score_many(queries or self.study.queries, self.study.items, progress=self._progress(name))
        return np.stack([ranking.tau.astype(np.float64) for ranking in rankings])

    def first_order_scores(
        self, queries: Sequence[TeacherQuery], form: Form, only: str | None = None
    ) -> dict[str, DoubleArray]:
        """tau [q, n] by variant for any queries; ``only`` one of them where not all are wanted."""
        plan = {n: v for n, v in self._plan(form).items() if only in (None, n)}
        kinds = list(dict.fromkeys((teacher, damping) for teacher, _, damping in plan.values()))
        found = self._query_gradients(queries, form)
        parts = [self._preconditioner(t).precondition(found, d) for t, d in kinds]
        items = self.gradients(form)
        by_layer = {
            name: items.products(name, torch.cat([part[name] for part in parts])).reshape(self.count, len(kinds), -1)
            for name in self.layers
        }  # [n, kinds, q]
        tau: dict[str, DoubleArray] = {}
        for name, (kind, selection, damping) in plan.items():
            inside = select_layers(self.model.unet, selection)
            total = sum(by_layer[layer][:, kinds.index((kind, damping))] for layer in inside)
            tau[name] = np.asarray(total).T / self.count
        return tau

    def kernel_scores(self, queries: Sequence[TeacherQuery], teacher: str) -> dict[str, DoubleArray]:
        """tau [q, n] of ``trak`` or ``d_trak`` by variant: k_q (K + lambda)^-1, K the items' Gram matrix."""
        found = self._query_gradients(queries, KERNELS[teacher])
        items = self.gradients(KERNELS[teacher])
        grams = {name: items.gram(name) for name in self.layers}
        meets = {name: items.products(name, found[name]) for name in self.layers}
        tau: dict[str, DoubleArray] = {}
        for name, (selection, damping) in self._kernel_plan(teacher).items():
            inside = select_layers(self.model.unet, selection)
            gram = np.sum([grams[layer] for layer in inside], axis=0)
            ridge = damping * np.trace(gram) / len(gram) * np.eye(len(gram))
            tau[name] = np.linalg.solve(gram + ridge, np.sum([meets[layer] for layer in inside], axis=0)).T
        return tau

    def gradients(self, form: Form) -> StoredGradients:
        """The items' gradients over the widest selection; one pass, resumable."""
        scheme = self.settings.unlearning(self.count).noise_scheme
        return store_gradients(
            self.model, self.layers, self.study.items, scheme, self._gradient_directory / f"{form}.npy",
            aggregation="sum" if form == "output_norm" else form, objective=_objective(form),
            progress=self._progress(f"gradients, {form}"),
        )  # fmt: skip

    def _query_gradients(self, queries: Sequence[TeacherQuery], form: Form) -> dict[str, torch.Tensor]:
        settings = self.settings.unlearning(self.count)
        return query_gradients(self.model, self.layers, queries, settings, objective=_objective(form))

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
            return DiagonalFisher.load(directory, self.model.revision).to(self.model.device)
        items = self.study.items
        fisher = fit_diagonal_fisher(
            self.model, self.model.encode_images([i.image for i in items]),
            self.model.encode_prompts([i.caption for i in items]), selection=selection, samples=self.settings.samples,
            seed=self.settings.seed, progress=self._progress("diagonal Fisher"),
        )  # fmt: skip
        fisher.save(self.files.target(fisher_name(selection)))
        return fisher

    def simple_baselines(self) -> dict[str, DoubleArray]:
        """What needs no model at all: chance, and the share of caption words in common with the prompt."""
        prompts, captions = ([set(text.lower().split()) for text in texts] for texts in (
            [q.prompt for q in self.study.queries], [i.caption for i in self.study.items]))
        words = [[len(p & c) / max(1, len(p | c)) for c in captions] for p in prompts]
        rng = np.random.default_rng([self.settings.seed, 5])
        return {"random": rng.standard_normal((len(prompts), len(captions))), "caption words": np.array(words)}

    def _plan(self, form: Form) -> dict[str, tuple[str, str, float]]:
        """Variant name -> (teacher, selection, damping) of one form."""
        return {
            variant(teacher, selection, damping, form): (teacher, selection, damping)
            for teacher in FIRST_ORDER
            for selection in self.settings.selections
            for damping in (self.settings.dampings if teacher != "gradient_linear" else (0.0,))
        }

    def _kernel_plan(self, teacher: str) -> dict[str, tuple[str, float]]:
        """Variant name -> (selection, damping) of a kernel teacher."""
        return {
            f"{teacher} {selection} {damping:g}": (selection, damping)
            for selection in self.settings.selections
            for damping in self.settings.dampings
        }

    def _preconditioner(self, teacher: str) -> Preconditioner:
        if teacher == "abu_plus_linear":
            return self.curvature(self.widest)
        if teacher == "abu_linear":
            return self.diagonal(self.widest)
        return NoCurvature(self.widest, self.model.revision)

    def _progress(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self._report(stage, done, total)

    def _path(self, name: str) -> Path:
        slug = "".join(c if c.isalnum() or c in ".-_" else "_" for c in name)
        return self.directory / f"{slug}.npy"
