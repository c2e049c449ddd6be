"""``prompt_gain``: by how much the prompt helps the attributed model to predict the image.

Why it exists: a model explains an image it made from a prompt far better with that prompt than without; a photograph,
another model's image or another prompt it does not. The logarithm of the ratio of the two denoising losses is the
pointwise information between image and prompt under the model (Kong et al., "Interpretable Diffusion via Information
Decomposition", ICLR 2024; as a classifier: Li et al., "Your Diffusion Model is Secretly a Zero-Shot Classifier", ICCV
2023). It is no feature of a head but the evidence that a query is attributable at all, see docs/calibration.md. It
needs a model trained with dropped captions, as every model for classifier-free guidance is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image

from byline.features.denoiser import DenoisingModel
from byline.features.encoder import Features, Modality, batches, identity_hash, stack

NAME = "prompt_gain"
#: Share of the schedule at which the image is noised, and the noise: one draw separates, more cost as much again.
_FRACTION = 0.3
_NOISE_SEED = 0


class LossModel(DenoisingModel, Protocol):
    """The part of ``byline.diffusion.DiffusionModel`` that is needed here."""

    latent_shape: tuple[int, int, int]

    def denoising_loss(
        self, latents: torch.Tensor, states: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Mean squared error [n]."""


class PromptGain:
    """log(loss without prompt / loss with it) [n, 1]; positive where the prompt helps, 0 for an empty prompt."""

    name = NAME
    modality: Modality = "pair"
    dim = 1

    def __init__(self, model: LossModel) -> None:
        self._model = model
        self._timestep = round(_FRACTION * (model.num_timesteps - 1))
        self.preprocessing_hash = identity_hash(
            name=self.name, revision=model.revision, timestep=self._timestep, seed=_NOISE_SEED
        )

    def encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Features:
        """The gain [n, 1] of the pairs."""
        if not images:
            return stack((), self.dim)
        return stack((self._encode(images[part], texts[part]) for part in batches(len(images))), self.dim)

    @torch.inference_mode()
    def _encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> torch.Tensor:
        model, n = self._model, len(images)
        latents = model.encode_images(list(images))
        states = model.encode_prompts([*texts, *[""] * n]).to(latents)
        noise = torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(_NOISE_SEED))
        noise = noise.to(latents).expand(2 * n, *model.latent_shape)
        times = torch.full((2 * n,), self._timestep, device=latents.device, dtype=torch.long)
        loss = model.denoising_loss(torch.cat([latents, latents]), states, times, noise).clamp_min(1e-12).log()
        return (loss[n:] - loss[:n])[:, None]
