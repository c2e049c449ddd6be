"""Teachers by name, ready to score or ready to be fitted.

Why it exists: workers, curation and the command line must build the very same teacher from a name, a layer
selection and a few settings, or their rankings could not be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from byline.diffusion.model import DiffusionModel
from byline.errors import TeacherNotUsable
from byline.teachers.curvature import Curvature
from byline.teachers.curvature_fit import fit_curvature
from byline.teachers.files import PUBLISHED_SELECTION, TeacherFiles, is_fitted
from byline.teachers.layers import SELECTIONS
from byline.teachers.natural_gradient import UnlearningSettings
from byline.teachers.ranking import (
    Check,
    Progress,
    Ranking,
    Teacher,
    TeacherQuery,
    ignore_progress,
    never_cancelled,
)
from byline.teachers.recipes import TEACHERS, Corpus, Fitting, Order, Recipe


class UnfittedTeacher:
    """A registered teacher whose curvature, sketches or features are not there yet: ``fit`` makes them."""

    def __init__(self, name: str, recipe: Recipe, order: Order) -> None:
        """Nothing is loaded or fitted."""
        self._name = name
        self._recipe = recipe
        self._order = order
        self._made: Teacher | None = None

    def prepare(
        self, corpus: Corpus, *, progress: Progress = ignore_progress, check: Check = never_cancelled
    ) -> Teacher:
        """Fit only what scoring needs, on ``corpus``, and return the teacher itself."""
        if self._made is None:
            if not corpus:
                raise TeacherNotUsable(f"teacher {self._name} has to be fitted, and the corpus holds no items")
            self._recipe.fit(self._order, corpus, progress, check)
            self._made = self._recipe.build(self._order)
            if self._made is None:
                raise TeacherNotUsable(f"teacher {self._name} was fitted, but what it needs is not in the cache")
        return self._made

    def fit(self, corpus: Corpus, *, progress: Progress = ignore_progress, check: Check = never_cancelled) -> None:
        """See ``Teacher``."""
        self.prepare(corpus, progress=progress, check=check).fit(corpus, progress=progress, check=check)

    @property
    def teacher_id(self) -> str:
        """See ``Teacher``. TeacherNotUsable before ``fit``: what is fitted is part of the id."""
        return self._ready().teacher_id

    def score(
        self, query: TeacherQuery, candidates: Corpus, *, candidate_set: str = "given",
        progress: Progress = ignore_progress, check: Check = never_cancelled,
    ) -> Ranking:  # fmt: skip
        """See ``Teacher``. TeacherNotUsable before ``fit``."""
        return self._ready().score(query, candidates, candidate_set=candidate_set, progress=progress, check=check)

    def score_many(
        self, queries: Sequence[TeacherQuery], candidates: Corpus, *, candidate_set: str = "given",
        progress: Progress = ignore_progress, check: Check = never_cancelled,
    ) -> list[Ranking]:  # fmt: skip
        """See ``Teacher``. TeacherNotUsable before ``fit``."""
        return self._ready().score_many(
            queries, candidates, candidate_set=candidate_set, progress=progress, check=check
        )

    def _ready(self) -> Teacher:
        if self._made is None:
            raise TeacherNotUsable(f"teacher {self._name} has not been fitted on this model: call fit(corpus) first")
        return self._made


def load_teacher(
    name: str,
    model: DiffusionModel,
    files: TeacherFiles,
    settings: UnlearningSettings,
    *,
    selection: str = PUBLISHED_SELECTION,
    fitting: Fitting | None = None,
) -> Teacher:
    """A registered teacher; an ``UnfittedTeacher`` when something it needs is not there yet.

    Raises TeacherNotUsable for an unknown name or selection, ModelNotUsable when an encoder's weights are missing.
    """
    if name not in TEACHERS:
        raise TeacherNotUsable(f"teacher {name!r} is unknown; choose one of {sorted(TEACHERS)}")
    if selection not in SELECTIONS:
        raise TeacherNotUsable(f"layer selection {selection!r} is unknown; choose one of {sorted(SELECTIONS)}")
    order = Order(model, files, settings, selection, fitting or Fitting())
    return TEACHERS[name].build(order) or UnfittedTeacher(name, TEACHERS[name], order)


def load_ready_teacher(
    name: str,
    model: DiffusionModel,
    files: TeacherFiles,
    settings: UnlearningSettings,
    corpus: Callable[[], Corpus],
    *,
    selection: str = PUBLISHED_SELECTION,
    fitting: Fitting | None = None,
    progress: Progress = ignore_progress,
    check: Check = never_cancelled,
) -> Teacher:
    """``load_teacher``, fitted on ``corpus()`` first where that is needed to score at all; the corpus is read
    only then. Raises what ``load_teacher`` and ``check`` raise."""
    teacher = load_teacher(name, model, files, settings, selection=selection, fitting=fitting)
    if isinstance(teacher, UnfittedTeacher):
        return teacher.prepare(corpus(), progress=progress, check=check)
    return teacher


#: Whether a folder holds fitted curvature of this model revision.
holds_curvature = is_fitted


def ensure_curvature(
    model: DiffusionModel,
    items: Corpus,
    directory: Path,
    *,
    selection: str = PUBLISHED_SELECTION,
    samples: int = 4096,
    seed: int = 0,
    progress: Progress = ignore_progress,
    check: Check = never_cancelled,
) -> Curvature:
    """Load the curvature in ``directory`` if it is this model's, else fit it on ``items`` and save it; on its device.

    For programs that make what a model is shipped with; everybody else asks ``load_ready_teacher``.
    """
    if is_fitted(directory, model.revision):
        return Curvature.load(directory, model.revision).to(model.device)
    latents = model.encode_images([item.image for item in items])
    states = model.encode_prompts([item.caption for item in items])
    curvature = fit_curvature(
        model, latents, states, selection=selection, samples=samples, seed=seed, progress=progress, check=check
    )
    curvature.save(directory)
    return curvature
