"""Teachers by name, with curvature fitted once per model and kept beside it.

Why it exists: workers, curation and the command line must build the very same teacher from a name
and a few settings, or their rankings could not be compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from byline.diffusion.model import DiffusionModel
from byline.errors import TeacherNotUsable
from byline.teachers.abu_plus import AbuPlus
from byline.teachers.curvature import Curvature, fit_curvature
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.natural_gradient import UnlearningSettings
from byline.teachers.ranking import Progress, Teacher, TeacherItem, ignore_progress

TEACHERS: dict[str, Callable[[DiffusionModel, Curvature, UnlearningSettings], AbuPlus | AbuPlusLinear]] = {
    "abu_plus": AbuPlus,
    "abu_plus_linear": AbuPlusLinear,
}


def load_teacher(name: str, model: DiffusionModel, curvature_directory: Path, settings: UnlearningSettings) -> Teacher:
    """A registered teacher on already fitted curvature.

    Raises TeacherNotUsable for an unknown name or curvature of another model revision.
    """
    if name not in TEACHERS:
        raise TeacherNotUsable(f"teacher {name!r} is unknown; choose one of {sorted(TEACHERS)}")
    return TEACHERS[name](model, Curvature.load(curvature_directory, model.revision), settings)


def holds_curvature(directory: Path, model_revision: str) -> bool:
    """Whether ``directory`` holds fitted curvature of this model revision (and not of an earlier checkpoint)."""
    path = directory / "manifest.json"
    return path.exists() and json.loads(path.read_text()).get("model_revision") == model_revision


def ensure_curvature(
    model: DiffusionModel,
    items: Sequence[TeacherItem],
    directory: Path,
    *,
    selection: str = "cross_attention_kv",
    samples: int = 4096,
    seed: int = 0,
    progress: Progress = ignore_progress,
) -> Curvature:
    """Load the curvature in ``directory`` if it is this model's, else fit it on ``items`` and save it."""
    if holds_curvature(directory, model.revision):
        return Curvature.load(directory, model.revision)
    latents = model.encode_images([item.image for item in items])
    states = model.encode_prompts([item.caption for item in items])
    curvature = fit_curvature(
        model, latents, states, selection=selection, samples=samples, seed=seed, progress=progress
    )
    curvature.save(directory)
    return curvature
