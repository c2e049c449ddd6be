"""``denoiser``: what the attributed model itself sees in an image.

Why it exists: mid-block activations of the noised image were the best single feature measured
(influence is a property of this very network), and they cost no extra model. They belong to one model
revision, so the hash carries it: features of another checkpoint are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image

from byline.features.encoder import Features, Modality, batches, identity_hash, stack

#: Shares of the schedule at which the image is noised: structure late, texture early.
_FRACTIONS = (0.1, 0.3, 0.5)
_NOISE_SEED = 0


class DenoisingModel(Protocol):
    """The part of ``byline.diffusion.DiffusionModel`` that is needed here."""

    revision: str
    num_timesteps: int
    device: str

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Latents [n, c, h, w]."""

    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Token states [n, tokens, dim]."""

    def mid_block_features(
        self, latents: torch.Tensor, states: torch.Tensor, timesteps: Sequence[int], seed: int
    ) -> torch.Tensor:
        """Mid-block features [n, dim], averaged over the timesteps."""


class Denoiser:
    """Mid-block features of image and prompt together, averaged over three timesteps with fixed noise."""

    name = "denoiser"
    modality: Modality = "pair"

    def __init__(self, model: DenoisingModel) -> None:
        self._model = model
        self._timesteps = tuple(round(fraction * (model.num_timesteps - 1)) for fraction in _FRACTIONS)
        self.preprocessing_hash = identity_hash(
            name=self.name, revision=model.revision, timesteps=self._timesteps, seed=_NOISE_SEED
        )
        self.dim = self.encode([Image.new("RGB", (8, 8), "white")], [""]).shape[1]

    def encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Features:
        """Features [n, dim] of the pairs."""
        if not images:
            return stack((), self.dim)
        rows = batches(len(images))
        return stack((self._encode(images[part], texts[part]) for part in rows), 0)

    @torch.inference_mode()
    def _encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> torch.Tensor:
        latents = self._model.encode_images(list(images))
        states = self._model.encode_prompts(list(texts)).to(latents)
        return self._model.mid_block_features(latents, states, self._timesteps, _NOISE_SEED)
