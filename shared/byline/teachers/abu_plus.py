"""AbU+ in its exact, finite-step form: the oracle, and the verification tier.

Why it exists: every cheaper form (first order, sketches, the student) is judged against this one.
One natural-gradient *ascent* step on the query's denoising loss, restricted to the selected layers,
then the rise of each candidate's loss under common random numbers (FastGDA §3.1; AbU §4):

    theta' = theta + step * (F + damping)^-1 grad L(query),    tau(item) = L(item; theta') - L(item; theta)

tau > 0: unlearning the query hurt the item, so the item mattered. What differs from the published
code: noise is keyed by item and not by batch, so baselines are cached across queries and the score
does not depend on batch size; the weights are swapped by a functional call, nothing is reloaded;
and the step is calibrated into the linear regime, where the ranking does not depend on it. tau is
reported for the published step 1 / N, whatever step was taken to measure it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from byline.diffusion.model import DiffusionModel
from byline.errors import TeacherNotUsable
from byline.teachers.natural_gradient import NaturalGradientTeacher, UnlearningSettings
from byline.teachers.preconditioner import Preconditioner
from byline.teachers.ranking import (
    Check,
    Progress,
    Ranking,
    TeacherItem,
    TeacherQuery,
    ignore_progress,
    never_cancelled,
    summarise,
)

#: Noise key of the query where it stands among the items; no corpus item has a negative id.
QUERY_AS_ITEM = -1


class AbuPlus(NaturalGradientTeacher):
    """The exact teacher. Keeps the baselines it has measured so far."""

    method = "abu_plus"

    def __init__(
        self, model: DiffusionModel, curvature: Preconditioner, settings: UnlearningSettings, batch: int = 128
    ) -> None:
        """See ``NaturalGradientTeacher``."""
        super().__init__(model, curvature, settings, batch)
        self._baselines: dict[str, NDArray[np.float64]] = {}

    def score(
        self,
        query: TeacherQuery,
        candidates: Sequence[TeacherItem],
        *,
        candidate_set: str = "given",
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> Ranking:
        """Exact tau of every candidate for the query; see the module for the formula and the sign."""
        direction = self.direction(query)
        check()
        step = self.calibrate(direction, query)
        per_draw = self.rise(direction, step, candidates, progress, check)  # [n, draws]
        scale = 1.0 / (self.settings.corpus_size * step)
        draws = self.settings.item_draws
        replicates = np.stack(
            [per_draw[:, r :: self.settings.replicates].mean(1) for r in range(self.settings.replicates)]
        )
        ids = np.array([item.item_id for item in candidates], dtype=np.int64)
        return summarise(replicates * scale, ids, draws, self.teacher_id, candidate_set)

    def rise(
        self,
        direction: dict[str, torch.Tensor],
        step: float,
        items: Sequence[TeacherItem],
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> NDArray[np.float64]:
        """Loss after minus loss before of each item and draw, float64 [n, draws]."""
        edited = self._edited(direction, step)
        rows = []
        for done, item in enumerate(items):
            check()
            rows.append(self._losses(item, edited) - self._baseline(item))
            progress(done + 1, len(items))
        return np.stack(rows) if rows else np.empty((0, self.settings.item_draws))

    def calibrate(self, direction: dict[str, torch.Tensor], query: TeacherQuery) -> float:
        """The largest step, in decades around 1 / N, that is linear on the query's own loss.

        The query's loss is the one the step moves most, so it leaves the linear regime first; and
        unlike a probe of the candidates it is the same whichever candidates are asked about.
        Raises TeacherNotUsable when the weight change is lost in float rounding at every linear step.
        """
        probe = TeacherItem(QUERY_AS_ITEM, query.image, query.prompt)
        before = self._losses(probe, {})
        trials = []
        for exponent in (1, 0, -1, -2, -3, -4):
            step = 10.0**exponent / self.settings.corpus_size
            lost = self._lost_in_rounding(direction, step)
            if lost > 0.05:
                trials.append(f"step {step:.3g}: {lost:.0%} of the change is lost in rounding")
                continue
            up, down, twice = (
                self._losses(probe, self._edited(direction, factor * step)) - before for factor in (1.0, -1.0, 2.0)
            )
            size = float(np.linalg.norm(up)) or float("inf")
            departure = max(float(np.linalg.norm(up + down)), float(np.linalg.norm(twice - 2 * up)) / 2) / size
            if departure <= self.settings.linearity:
                return step
            trials.append(f"step {step:.3g}: departs {departure:.2f} from linear")
        raise TeacherNotUsable("no unlearning step is both linear and representable: " + "; ".join(trials))

    def _edited(self, direction: dict[str, torch.Tensor], step: float) -> dict[str, torch.Tensor]:
        """The selected weights after a step along ``direction``, by parameter name."""
        edited: dict[str, torch.Tensor] = {}
        for name, change in direction.items():
            layer = self._layers[name]
            edited |= layer.parameters(layer.matrix() + step * change)
        return edited

    def _lost_in_rounding(self, direction: dict[str, torch.Tensor], step: float) -> float:
        """Share of the weight change (norm) that float32 addition loses; 0 = nothing, 1 = all."""
        lost = total = 0.0
        for name, change in direction.items():
            weight = self._layers[name].matrix()
            applied = (weight + step * change) - weight
            lost += float((applied - step * change).double().pow(2).sum())
            total += float((step * change).double().pow(2).sum())
        return (lost / total) ** 0.5 if total > 0 else 1.0

    def _baseline(self, item: TeacherItem) -> NDArray[np.float64]:
        """Losses under the unedited weights: the same for every query, so measured once per item."""
        key = f"{item.item_id}/{item.caption}"
        if key not in self._baselines:
            self._baselines[key] = self._losses(item, {})
        return self._baselines[key]

    @torch.no_grad()
    def _losses(self, item: TeacherItem, edited: dict[str, torch.Tensor]) -> NDArray[np.float64]:
        """Denoising losses of one item over all its draws, float64 [draws].

        The mean over c, h, w is taken in float64: the difference of two losses is far smaller than
        either, and a float32 mean would round it.
        """
        model = self.model
        key = self.scheme.key(item.item_id, item.caption)
        latent = model.encode_images([item.image])
        states = model.encode_prompts([item.caption])
        draws = self.settings.item_draws
        losses = []
        for start in range(0, draws, self.batch):
            indices = range(start, min(start + self.batch, draws))
            timesteps, noise = self.scheme.draw(key, indices, model.latent_shape, model.num_timesteps)
            timesteps, noise = timesteps.to(model.device), noise.to(model.device)
            clean = latent.expand(len(indices), -1, -1, -1)
            output = torch.func.functional_call(
                model.unet,
                edited,
                (model.add_noise(clean, noise, timesteps), timesteps),
                {"encoder_hidden_states": states.expand(len(indices), -1, -1), "return_dict": False},
            )[0]
            error = (output - model.target(clean, noise, timesteps)).double()
            losses.append(error.pow(2).flatten(1).mean(1).cpu().numpy())
        return np.concatenate(losses)
