"""What every registered teacher is made of: which curvature, which files, and how they are fitted.

Why it exists: teachers differ in two or three ingredients; with one line each they can be compared by one command,
and a new one is one line more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from byline.diffusion.model import DiffusionModel
from byline.features.registry import ENCODERS, GRADIENT
from byline.teachers.abu_plus import AbuPlus
from byline.teachers.curvature import Curvature
from byline.teachers.curvature_fit import fit_curvature
from byline.teachers.diagonal_fisher import DiagonalFisher, fit_diagonal_fisher
from byline.teachers.files import SKETCHES, TeacherFiles, curvature_name, fisher_name
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.item_gradients import Objective
from byline.teachers.layers import SELECTIONS
from byline.teachers.natural_gradient import UnlearningSettings
from byline.teachers.preconditioner import NoCurvature, Preconditioner
from byline.teachers.projected import ProjectedGradientTeacher
from byline.teachers.ranking import Check, Progress, Teacher, TeacherItem
from byline.teachers.row_store import digest_of
from byline.teachers.similarity import PIXELS, SimilarityTeacher
from byline.teachers.sketch import SketchTeacher
from byline.teachers.sketch_fit import fit_sketches
from byline.teachers.sketch_set import SketchSet
from byline.teachers.sparse_projection import SparseProjection

Corpus = Sequence[TeacherItem]


@dataclass(frozen=True)
class Fitting:
    """How much a fit may cost.

    ``samples`` (timestep, noise) draws of a curvature, from ``seed``; ``dimensions`` of the random projection of
    ``trak`` and ``d_trak``; ``sketch_dimensions`` of sketches, kept out of ``sketch_coordinates``.
    """

    samples: int = 4096
    seed: int = 0
    dimensions: int = 2048
    sketch_dimensions: int = 512
    sketch_coordinates: int = 16384


@dataclass(frozen=True)
class Order:
    """What a teacher is asked to be made from."""

    model: DiffusionModel
    files: TeacherFiles
    settings: UnlearningSettings
    selection: str
    fitting: Fitting


@dataclass(frozen=True)
class Recipe:
    """How one registered teacher is made. ``build`` gives None when something it needs has not been fitted yet."""

    build: Callable[[Order], Teacher | None]
    fit: Callable[[Order, Corpus, Progress, Check], None]


#: How a preconditioner is found; None when it has not been fitted.
Curved = Callable[[Order], Preconditioner | None]
Fit = Callable[[Order, Corpus, Progress, Check], None]


class Abu(AbuPlus):
    """The exact form on a diagonal Fisher matrix: AbU as first published (with damping, as AbU+ has it)."""

    method = "abu"


class AbuLinear(AbuPlusLinear):
    """The first-order form on a diagonal Fisher matrix."""

    method = "abu_linear"


class GradientLinear(AbuPlusLinear):
    """Inner products of plain gradients: what curvature is worth is the distance to this one."""

    method = "gradient_linear"


# -- curvature ----------------------------------------------------------------------------------


def ekfac(order: Order) -> Curvature | None:
    """EK-FAC factors of the selection, or those of the next wider one that are there."""
    for selection in _at_least(order.selection):
        directory = order.files.find(curvature_name(selection), order.model.revision)
        if directory is not None:
            return Curvature.load(directory, order.model.revision).restrict(order.selection).to(order.model.device)
    return None


def fit_ekfac(order: Order, corpus: Corpus, progress: Progress, check: Check) -> None:
    """Fit the factors into the cache unless they are there; a killed fit resumes."""
    if ekfac(order) is not None:
        return
    name = curvature_name(order.selection)
    curvature = fit_curvature(
        order.model, *_encoded(order.model, corpus), selection=order.selection, samples=order.fitting.samples,
        seed=order.fitting.seed, directory=order.files.scratch(name), progress=progress, check=check,
    )  # fmt: skip
    with order.files.publishing(name, order.model.revision) as directory:
        curvature.save(directory)
    order.files.clear_scratch(name)


def diagonal(order: Order) -> DiagonalFisher | None:
    """The diagonal Fisher of the selection, or that of the next wider one that is there."""
    for selection in _at_least(order.selection):
        directory = order.files.find(fisher_name(selection), order.model.revision)
        if directory is not None:
            fisher = DiagonalFisher.load(directory, order.model.revision)
            return fisher.restrict(order.selection).to(order.model.device)
    return None


def fit_diagonal(order: Order, corpus: Corpus, progress: Progress, check: Check) -> None:
    """Fit the diagonal Fisher into the cache unless it is there; a killed fit resumes."""
    if diagonal(order) is not None:
        return
    name = fisher_name(order.selection)
    fisher = fit_diagonal_fisher(
        order.model, *_encoded(order.model, corpus), selection=order.selection, samples=order.fitting.samples,
        seed=order.fitting.seed, directory=order.files.scratch(name), progress=progress, check=check,
    )  # fmt: skip
    with order.files.publishing(name, order.model.revision) as directory:
        fisher.save(directory)
    order.files.clear_scratch(name)


def _plain(order: Order) -> NoCurvature:
    return NoCurvature(order.selection, order.model.revision)


def _nothing(order: Order, corpus: Corpus, progress: Progress, check: Check) -> None:
    """Needs no fit before it can score."""


def _at_least(selection: str) -> list[str]:
    """The selection and all wider ones, narrowest first."""
    names = list(SELECTIONS)
    return names[names.index(selection) :]


def _encoded(model: DiffusionModel, corpus: Corpus) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [n, c, h, w] and text states [n, tokens, dim] of the corpus."""
    return model.encode_images([item.image for item in corpus]), model.encode_prompts([i.caption for i in corpus])


# -- teachers -----------------------------------------------------------------------------------


def _exact(kind: type[AbuPlus], curved: Curved, fit: Fit) -> Recipe:
    def build(order: Order) -> Teacher | None:
        found = curved(order)
        return None if found is None else kind(order.model, found, order.settings, cache=order.files.cache)

    return Recipe(build, fit)


def _linear(kind: type[AbuPlusLinear], curved: Curved, fit: Fit) -> Recipe:
    def build(order: Order) -> Teacher | None:
        found = curved(order)
        return None if found is None else kind(order.model, found, order.settings)

    return Recipe(build, fit)


def _projected(method: str, objective: Objective) -> Recipe:
    def make(order: Order) -> ProjectedGradientTeacher:
        return ProjectedGradientTeacher(
            method, objective, order.model, order.files, order.settings, order.selection,
            projection=SparseProjection(order.fitting.dimensions),
        )  # fmt: skip

    def build(order: Order) -> Teacher | None:
        teacher = make(order)
        return teacher if teacher.is_fitted else None

    def fit(order: Order, corpus: Corpus, progress: Progress, check: Check) -> None:
        make(order).fit(corpus, progress=progress, check=check)

    return Recipe(build, fit)


def _sketch_set(order: Order) -> SketchSet | None:
    """The sketches of the selection: those under its own name, else what the model came with, if it fits."""
    for name in (f"{SKETCHES}-{order.selection}", SKETCHES):
        directory = order.files.find(name, order.model.revision)
        if directory is not None:
            found = SketchSet.load(directory, order.model.revision)
            if found.basis.selection == order.selection:
                return found
    return None


def _build_sketch(order: Order) -> Teacher | None:
    """Settings are those the sketches were fitted under, but for the query's draws (see ``SketchTeacher``)."""
    curvature = ekfac(order)
    known = _sketch_set(order) if curvature is not None else None
    if curvature is None or known is None:
        return None
    return SketchTeacher(order.model, curvature, known.basis, known, query_draws=order.settings.query_draws)


def _fit_sketch(order: Order, corpus: Corpus, progress: Progress, check: Check) -> None:
    """Curvature, then one gradient pass over the corpus; either resumes."""
    fit_ekfac(order, corpus, progress, check)
    curvature = ekfac(order)
    if curvature is None or _sketch_set(order) is not None:
        return
    name = f"{SKETCHES}-{order.selection}"
    teacher = AbuPlusLinear(order.model, curvature, order.settings)
    # What a killed fit left is of these settings and items only.
    unfinished = f"{name}-{digest_of(f'{teacher.teacher_id}/{order.fitting}', corpus, {})[:12]}"
    fitted = fit_sketches(
        teacher, corpus, dimensions=order.fitting.sketch_dimensions, coordinates=order.fitting.sketch_coordinates,
        store=order.files.scratch(unfinished), seed=order.fitting.seed, progress=progress, check=check,
    )  # fmt: skip
    with order.files.publishing(name, order.model.revision) as directory:
        fitted.save(directory)
    order.files.clear_scratch(unfinished)


def _similarity(encoder: str) -> Recipe:
    return Recipe(lambda order: SimilarityTeacher(encoder, order.model), _nothing)


#: The gradient feature is no raw feature to compare a teacher with, but a teacher's own, cheaply: see ``sketch``.
RAW = tuple(name for name in ENCODERS if name != GRADIENT)

TEACHERS: dict[str, Recipe] = {
    "abu_plus": _exact(AbuPlus, ekfac, fit_ekfac),
    "abu_plus_linear": _linear(AbuPlusLinear, ekfac, fit_ekfac),
    "abu": _exact(Abu, diagonal, fit_diagonal),
    "abu_linear": _linear(AbuLinear, diagonal, fit_diagonal),
    "gradient_linear": _linear(GradientLinear, _plain, _nothing),
    "sketch": Recipe(_build_sketch, _fit_sketch),
    "trak": _projected("trak", "denoising"),
    "d_trak": _projected("d_trak", "output_norm"),
    **{f"similarity:{name}": _similarity(name) for name in (*RAW, PIXELS)},
}
