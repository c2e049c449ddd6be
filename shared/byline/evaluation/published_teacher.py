"""The unlearning teacher as it was published, to be measured beside ours and for nothing else.

Why it exists: "a hundred times cheaper" is a ratio, and its denominator must be run, in the same process on the same
machine, not quoted. This is the published procedure (FastGDA appendix and released code, as specified in
reference/method.md §3, §1.4 and §3.4), written from that text:

- the model's weights and the curvature's factors are read from disk again for every query (timed apart);
- the query's gradient: ``query_draws`` timesteps uniform with replacement, fresh noise, one backward per batch;
- one EK-FAC step upwards, damping 0.1 times the layer's mean eigenvalue, written into the weights;
- an item's loss: the mean over equally spaced timesteps, each with noise of its own, float32, the noise of a batch
  seeded by the batch's position; the same before and after;
- losses before the step: once where the whole corpus is scored, again for every query where neighbours are (§3.4).

Not copied: the step size, whose published value depends on an unpublished scale of the factors (§3.2); the caller
gives one inside the linear regime, where the ranking does not depend on it. Left out: several captions and flips of an
item, which multiply the cost of both sides alike, and previews. Latents and text states are prepared beforehand.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from byline.diffusion.model import DiffusionModel
from byline.errors import TeacherNotUsable
from byline.teachers.ranking import TeacherItem, TeacherQuery

_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class PublishedSettings:
    """What the published procedure can choose. ``images_per_batch`` decides which noise an item gets."""

    query_draws: int = 1024
    item_draws: int = 64
    damping: float = 0.1
    images_per_batch: int = 2
    query_batch: int = 64
    seed: int = 0


@dataclass(frozen=True)
class PublishedScores:
    """``rises`` float32 [n, draws]: loss after minus loss before, their mean over draws is the score; CPU seconds.

    ``seconds`` by part: restore, gradient, step, losses; ``baselines`` is what ``losses`` cost before the step.
    """

    rises: torch.Tensor
    seconds: dict[str, float]


class PublishedTeacher:
    """One model directory and its published-layout factors. Owns ``model.unet``'s weights: they are overwritten."""

    def __init__(self, model: DiffusionModel, factors: Path, settings: PublishedSettings) -> None:
        """``factors``: four safetensors in the published layout. TeacherNotUsable if draws do not divide the schedule.

        Published strides are whole numbers of timesteps; here the schedule must have at least one per draw.
        """
        if not 0 < settings.item_draws <= model.num_timesteps:
            raise TeacherNotUsable(f"item_draws must lie between 1 and {model.num_timesteps}")
        self.model = model
        self.factors = factors
        self.settings = settings
        stride = model.num_timesteps / settings.item_draws
        self.timesteps = torch.tensor([int(stride * i) for i in range(settings.item_draws)], device=model.device)

    def prepare(self, items: Sequence[TeacherItem]) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [n, c, h, w] and text states [n, tokens, dim]: the published code has them on disk, so not timed."""
        latents = self.model.encode_images([item.image for item in items])
        states = [self.model.encode_prompts([item.caption for item in items[i : i + 64]])
                  for i in range(0, len(items), 64)]  # fmt: skip
        return latents, torch.cat(states)

    def score(
        self, query: TeacherQuery, prepared: tuple[torch.Tensor, torch.Tensor], baselines: torch.Tensor, step: float
    ) -> PublishedScores:
        """Rises of all prepared items for one query; the model is left unlearned, as the next query restores it.

        ``baselines`` [n, draws] are ``losses`` under the restored weights. ``step`` multiplies (F + damping)^-1 grad.
        """
        clock = _Laps()
        self.restore()
        clock.lap("restore")
        gradient = self.query_gradient(query)
        clock.lap("gradient")
        self.apply(gradient, step)
        clock.lap("step")
        after = self.losses(*prepared)
        clock.lap("losses")
        return PublishedScores(after - baselines, clock.seconds)

    def restore(self) -> None:
        """Weights and factors from disk, as the published job does for every query."""
        self.model.unet.load_state_dict(load_file(self.model.directory / _WEIGHTS))
        self._factors = _read_factors(self.factors, self.model.device)

    def query_gradient(self, query: TeacherQuery) -> dict[str, torch.Tensor]:
        """Mean gradient of the query's loss, per layer [out, in]; timesteps uniform, with replacement."""
        model, settings = self.model, self.settings
        generator = torch.Generator().manual_seed(settings.seed + 1)
        latent, states = model.encode_images([query.image]), model.encode_prompts([query.prompt])
        weights = {n: self._weight(n).requires_grad_(True) for n in self._factors}
        total = {n: torch.zeros_like(w) for n, w in weights.items()}
        try:
            for start in range(0, settings.query_draws, settings.query_batch):
                count = min(settings.query_batch, settings.query_draws - start)
                timesteps = torch.randint(0, model.num_timesteps, (count,), generator=generator)
                noise = torch.randn(count, *model.latent_shape, generator=generator)
                with torch.enable_grad():
                    loss = model.denoising_loss(
                        latent.expand(count, -1, -1, -1), states.expand(count, -1, -1),
                        timesteps.to(model.device), noise.to(model.device),
                    ).sum() / settings.query_draws  # fmt: skip
                    found = torch.autograd.grad(loss, list(weights.values()))
                for name, gradient in zip(weights, found, strict=True):
                    total[name] += gradient
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)
        return total

    @torch.no_grad()
    def apply(self, gradient: dict[str, torch.Tensor], step: float) -> None:
        """theta += step * U_B [(U_B^T G U_A) / (S + damping * mean S)] U_A^T, in place."""
        for name, change in self.direction(gradient).items():
            self._weight(name).add_(change, alpha=step)

    def direction(self, gradient: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """(F + damping)^-1 gradient, per layer [out, in]."""
        directions = {}
        for name, g in gradient.items():
            activation, output, eigenvalues = self._factors[name]
            damped = eigenvalues + self.settings.damping * eigenvalues.mean()
            directions[name] = output @ ((output.T @ g @ activation) / damped) @ activation.T
        return directions

    @torch.no_grad()
    def losses(self, latents: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Denoising losses under the present weights, float32 [n, draws]; noise seeded by the batch's position."""
        model, settings = self.model, self.settings
        draws, size = settings.item_draws, settings.images_per_batch
        rows = []
        for position, start in enumerate(range(0, len(latents), size)):
            clean, text = latents[start : start + size], states[start : start + size]
            generator = torch.Generator().manual_seed(settings.seed + position)
            noise = torch.randn(len(clean) * draws, *model.latent_shape, generator=generator).to(model.device)
            losses = model.denoising_loss(
                clean.repeat_interleave(draws, 0), text.repeat_interleave(draws, 0),
                self.timesteps.repeat(len(clean)), noise,
            )  # fmt: skip
            rows.append(losses.reshape(len(clean), draws).cpu())
        return torch.cat(rows)

    def _weight(self, layer: str) -> torch.Tensor:
        weight: torch.Tensor = self.model.unet.get_submodule(layer).weight
        return weight


def _read_factors(directory: Path, device: str) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Per layer the activation basis [in, in], gradient basis [out, out] and corrected eigenvalues [out, in]."""
    names = ("activation_eigenvectors", "gradient_eigenvectors", "lambda_matrix", "num_lambda_processed")
    read = {name: load_file(directory / f"{name}.safetensors", device=device) for name in names}
    # Ours keep an activation basis that layers share once; the published files repeat it for every layer.
    owner = json.loads((directory / "manifest.json").read_text()).get("activation_of", {})
    return {
        layer: (
            read["activation_eigenvectors"][owner.get(layer, layer)],
            read["gradient_eigenvectors"][layer],
            eigenvalues / read["num_lambda_processed"][layer].item(),
        )
        for layer, eigenvalues in read["lambda_matrix"].items()
    }


class _Laps:
    """CPU seconds between calls of ``lap``, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.process_time()

    def lap(self, name: str) -> None:
        now = time.process_time()
        self.seconds[name] = now - self._last
        self._last = now
