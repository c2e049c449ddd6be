"""What every unlearning teacher shares: settings, noise, and the query's natural gradient.

Why it exists: the exact and the first-order form must differ in how they score items and in nothing
else, or their agreement would say nothing.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import torch

from byline.diffusion.model import DiffusionModel
from byline.errors import TeacherNotUsable
from byline.teachers.layers import capture, select_layers, weight_gradients
from byline.teachers.noise import NoiseScheme
from byline.teachers.preconditioner import Preconditioner
from byline.teachers.ranking import TeacherQuery


@dataclass(frozen=True)
class UnlearningSettings:
    """Everything that changes a score, but for the layers and the curvature (``Preconditioner``).

    ``corpus_size`` is N of the step 1 / N. ``query_draws`` (timestep, noise) pairs estimate the
    query's gradient; ``item_draws`` the item's loss. ``damping`` is relative to the mean eigenvalue
    of a layer. ``antithetic`` noise comes in pairs (eps, -eps) at one timestep. ``aggregation`` over
    timesteps: ``sum`` (as published: the mean rise of the loss), ``skew`` (each rise divided by the
    sum of the losses before and after), ``unit`` (each draw's gradient at unit norm). ``flips``: the
    item as it is, or both orientations and their ``max`` (as published) or ``mean``. ``linearity`` is
    the largest relative departure from tau(2s) = 2 tau(s) and tau(-s) = -tau(s) that calibration
    accepts. ``racing`` > 0 lets the exact form stop spending draws on candidates whose confidence
    interval lies below the boundary of the top ``racing``.
    """

    corpus_size: int
    query_draws: int = 256
    item_draws: int = 64
    replicates: int = 8
    damping: float = 0.1
    seed: int = 0
    noise: Literal["item", "shared"] = "item"
    antithetic: bool = False
    aggregation: Literal["sum", "skew", "unit"] = "sum"
    flips: Literal["none", "max", "mean"] = "none"
    linearity: float = 0.1
    racing: int = 0

    def digest(self) -> str:
        """First 8 hex digits over all fields, for the teacher id."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]


def query_gradient(
    model: DiffusionModel, curvature: Preconditioner, query: TeacherQuery, draws: int, seed: int, batch: int = 64
) -> dict[str, torch.Tensor]:
    """E[grad L(query)] over ``draws`` stratified (timestep, noise) pairs; per layer [rows, columns].

    The query's noise has a key of its own and is never an item's: sharing it is biased (C3).
    """
    layers = select_layers(model.unet, curvature.selection)
    scheme = NoiseScheme("item", seed, draws, 1)
    latent = model.encode_images([query.image])
    states = model.encode_prompts([query.prompt])
    total = {n: torch.zeros(layer.rows, layer.columns, device=model.device) for n, layer in layers.items()}
    for start in range(0, draws, batch):
        indices = range(start, min(start + batch, draws))
        timesteps, noise = scheme.draw("query", indices, model.latent_shape, model.num_timesteps)
        count = len(indices)
        with capture(layers) as record:
            losses = model.denoising_loss(
                latent.expand(count, -1, -1, -1),
                states.expand(count, -1, -1),
                timesteps.to(model.device),
                noise.to(model.device),
            )
            deltas = record.gradients(losses)
        for name, g in weight_gradients(record.inputs, deltas).items():
            total[name] += g.sum(0) / draws
    return total


class NaturalGradientTeacher:
    """Model, curvature, settings and noise of one teacher; ``method`` names it in its id."""

    method: ClassVar[str]

    def __init__(
        self, model: DiffusionModel, curvature: Preconditioner, settings: UnlearningSettings, batch: int = 128
    ) -> None:
        """Raises TeacherNotUsable for settings that do not fit together or curvature of another model."""
        if settings.item_draws % settings.replicates:
            raise TeacherNotUsable("item_draws must be a multiple of replicates")
        if curvature.model_revision != model.revision:
            raise TeacherNotUsable("the curvature was fitted on another revision of the model")
        self.model = model
        self.curvature = curvature
        self.settings = settings
        self.batch = batch
        self.scheme = NoiseScheme(settings.noise, settings.seed, settings.item_draws, settings.replicates)
        self._layers = select_layers(model.unet, curvature.selection)

    @property
    def teacher_id(self) -> str:
        """See ``Teacher``."""
        return f"{self.method}/{self.settings.digest()}/{self.curvature.name}/{self.scheme.name}"

    def direction(self, query: TeacherQuery) -> dict[str, torch.Tensor]:
        """The natural-gradient ascent direction (F + damping)^-1 grad L(query), per layer [rows, columns]."""
        gradient = query_gradient(
            self.model, self.curvature, query, self.settings.query_draws, self.settings.seed, self.batch
        )
        return self.curvature.precondition(gradient, self.settings.damping)
