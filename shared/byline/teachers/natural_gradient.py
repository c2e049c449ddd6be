"""What every unlearning teacher shares: settings, noise, and the query's natural gradient.

Why it exists: the exact and the first-order form must differ in how they score items and in nothing
else, or their agreement would say nothing.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar, Literal, Self

import torch

from byline.diffusion.model import DiffusionModel
from byline.errors import TeacherNotUsable
from byline.teachers.item_gradients import GradientBlock, ItemGradients, Objective
from byline.teachers.layers import EditableLayer, select_layers
from byline.teachers.noise import NoiseScheme
from byline.teachers.preconditioner import Preconditioner
from byline.teachers.ranking import Check, TeacherItem, TeacherQuery, never_cancelled


@dataclass(frozen=True)
class UnlearningSettings:
    """Everything that changes a score, but for the layers and the curvature (``Preconditioner``).

    ``corpus_size`` is N of the step 1 / N. ``query_draws`` (timestep, noise) pairs estimate the
    query's gradient; ``item_draws`` the item's loss. ``damping`` is relative to the mean eigenvalue
    of a layer. ``antithetic`` noise comes in pairs (eps, -eps) at one timestep. ``aggregation`` over
    timesteps: ``sum`` (as published: the mean rise of the loss), ``skew`` (each rise divided by the
    sum of the losses before and after), ``unit`` (each draw's gradient at unit norm). ``objective`` is what
    is unlearned and whose rise is tau: the ``denoising`` loss (as published), or ``output_norm``, the mean
    square of the network's output (D-TRAK's function), by retraining the better predictor. ``flips``: the
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
    objective: Objective = "denoising"
    flips: Literal["none", "max", "mean"] = "none"
    linearity: float = 0.1
    racing: int = 0

    @property
    def noise_scheme(self) -> NoiseScheme:
        """The items' noise. Raises TeacherNotUsable when the draws do not split into equal replicates."""
        return NoiseScheme(self.noise, self.seed, self.item_draws, self.replicates, self.antithetic)

    def digest(self) -> str:
        """First 8 hex digits over all fields, for the teacher id."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]


#: Noise key of every query, so that no item's noise is ever its own: sharing it is biased (C3).
QUERY_KEY = "query"
#: Item id a query bears where it is treated like an item; no corpus item has a negative id.
_QUERY_ID = -1


def query_blocks(
    model: DiffusionModel,
    layers: dict[str, EditableLayer],
    queries: Sequence[TeacherQuery],
    settings: UnlearningSettings,
    *,
    batch: int = 128,
    objective: Objective | None = None,
    replicates: int = 1,
    memory: int = 256 << 20,
    check: Check = never_cancelled,
) -> Iterator[tuple[slice, GradientBlock]]:
    """E[grad L(query)] over ``settings.query_draws`` stratified draws, a few queries at a time (``memory`` bytes).

    Draws of several queries share a batch. All queries have the same noise, under a key of their own.
    The plain mean over draws, whatever ``settings.aggregation``: that is about the items' rise, and
    the step that causes it is the published one. ``replicates`` splits the draws for a standard error.
    """
    scheme = NoiseScheme("item", settings.seed, settings.query_draws, replicates, settings.antithetic)
    gradients = ItemGradients(model, layers, scheme, batch, objective=objective or settings.objective)
    as_items = [TeacherItem(_QUERY_ID, query.image, query.prompt) for query in queries]
    chunk = max(1, memory // gradients.bytes_per_item())
    for start in range(0, len(queries), chunk):
        place = slice(start, min(start + chunk, len(queries)))
        yield place, gradients.block(as_items[place], key=QUERY_KEY, check=check)


def query_gradients(
    model: DiffusionModel,
    layers: dict[str, EditableLayer],
    queries: Sequence[TeacherQuery],
    settings: UnlearningSettings,
    *,
    batch: int = 128,
    objective: Objective | None = None,
    check: Check = never_cancelled,
) -> dict[str, torch.Tensor]:
    """The queries' gradients, per layer [q, rows, columns]; see ``query_blocks``."""
    total = {n: torch.empty(len(queries), e.rows, e.columns, device=model.device) for n, e in layers.items()}
    for place, block in query_blocks(model, layers, queries, settings, batch=batch, objective=objective, check=check):
        for name, gradient in total.items():
            gradient[place] = block.gradients(name)
    return total


def query_gradient(
    model: DiffusionModel,
    layers: dict[str, EditableLayer],
    query: TeacherQuery,
    settings: UnlearningSettings,
    *,
    batch: int = 128,
    objective: Objective | None = None,
    check: Check = never_cancelled,
) -> dict[str, torch.Tensor]:
    """One query's gradient, per layer [rows, columns]; see ``query_blocks``."""
    found = query_gradients(model, layers, [query], settings, batch=batch, objective=objective, check=check)
    return {name: gradient[0] for name, gradient in found.items()}


class NaturalGradientTeacher:
    """Model, curvature, settings and noise of one teacher; ``method`` names it in its id."""

    method: ClassVar[str]

    def __init__(
        self, model: DiffusionModel, curvature: Preconditioner, settings: UnlearningSettings, batch: int = 128
    ) -> None:
        """Raises TeacherNotUsable for settings that do not fit together or curvature of another model."""
        if curvature.model_revision != model.revision:
            raise TeacherNotUsable("the curvature was fitted on another revision of the model")
        self.model = model
        self.curvature = curvature
        self.settings = settings
        self.batch = batch
        self.scheme = settings.noise_scheme
        self._layers = select_layers(model.unet, curvature.selection)

    @property
    def teacher_id(self) -> str:
        """See ``Teacher``. The objective stands beside the method: what measures something else is another family."""
        objective = "" if self.settings.objective == "denoising" else f"+{self.settings.objective}"
        return f"{self.method}{objective}/{self.settings.digest()}/{self.curvature.name}/{self.scheme.name}"

    def resized(self, corpus_size: int) -> Self:
        """The same teacher for a corpus of another size, which scales tau: what it loaded and measured is shared."""
        if corpus_size == self.settings.corpus_size:
            return self
        other = copy.copy(self)
        other.settings = replace(self.settings, corpus_size=corpus_size)
        return other

    def directions(self, queries: Sequence[TeacherQuery], *, check: Check = never_cancelled) -> dict[str, torch.Tensor]:
        """Natural-gradient ascent directions (F + damping)^-1 grad L(query), per layer [q, rows, columns]."""
        gradients = query_gradients(self.model, self._layers, queries, self.settings, batch=self.batch, check=check)
        return self.curvature.precondition(gradients, self.settings.damping)

    def direction_halves(
        self, queries: Sequence[TeacherQuery], *, check: Check = never_cancelled
    ) -> dict[str, torch.Tensor]:
        """``directions`` from each of two disjoint halves of the query's draws, [2, q, rows, columns].

        Their mean is ``directions``; their difference is what the query's own noise does to a score.
        Raises TeacherNotUsable when the draws do not split into two halves (of antithetic pairs).
        """
        halves = {
            n: torch.empty(2, len(queries), e.rows, e.columns, device=self.model.device)
            for n, e in self._layers.items()
        }
        for place, block in query_blocks(
            self.model, self._layers, queries, self.settings, batch=self.batch, replicates=2, check=check
        ):
            for name, half in halves.items():
                half[:, place] = block.replicate_gradients(name).transpose(0, 1)
        return self.curvature.precondition(halves, self.settings.damping)

    def direction(self, query: TeacherQuery) -> dict[str, torch.Tensor]:
        """The direction of one query, per layer [rows, columns]; see ``directions``."""
        return {name: found[0] for name, found in self.directions([query]).items()}
