"""One text-to-image model, as attribution sees it: encode, add noise, measure the loss, sample.

Why it exists: the teacher, the curation service, the denoiser features and the trainer all need the
same few operations of *any* diffusers text-to-image directory (Stable Diffusion's layout with VAE
and CLIP text encoder, or the demo's, whose MiniLM text encoder is an installed package), with the
same revision hash. Nothing above this module knows which layout it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from byline.diffusion.text_encoding import TextEncoding, load_minilm
from byline.errors import ModelNotUsable

#: Files whose bytes decide what the model computes; everything else (cards, previews) may change.
_IDENTITY_SUFFIXES = (".safetensors", ".json", ".txt", ".model")


def directory_revision(directory: Path) -> str:
    """First 16 hex digits of the sha256 over names and contents of the model's own files."""
    digest = hashlib.sha256()
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    files = [p for part in parts for p in sorted((directory / part).rglob("*")) if p.suffix in _IDENTITY_SUFFIXES]
    for path in [p for p in (directory / "model_index.json", directory / "byline.json") if p.exists()] + files:
        digest.update(path.relative_to(directory).as_posix().encode() + b"\0")
        with path.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:16]


class DiffusionModel:
    """A frozen text-to-image diffusion model on one device, float32.

    ``revision`` names its weights and configuration; ``latent_shape`` is (channels, height, width).
    """

    def __init__(self, directory: Path, unet: Any, vae: Any, schedule: Any, text: TextEncoding, device: str) -> None:
        self.directory = directory
        self.unet = unet
        self.vae = vae
        self.schedule = schedule
        self.text = text
        self.device = device
        self.revision = directory_revision(directory)
        self.num_timesteps = int(schedule.config.num_train_timesteps)
        side = int(unet.config.sample_size)
        self.latent_shape: tuple[int, int, int] = (int(unet.config.in_channels), side, side)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_side = side * factor
        self._alphas_cumprod: torch.Tensor = schedule.alphas_cumprod.to(device)

    @classmethod
    def load(cls, directory: Path | str, device: str = "cpu") -> DiffusionModel:
        """Load a diffusers text-to-image directory.

        Raises ModelNotUsable naming what is missing. Weights are read from safetensors only.
        """
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

        directory = Path(directory)
        if not (directory / "model_index.json").exists():
            raise ModelNotUsable(f"{directory} is not a diffusers pipeline directory: it has no model_index.json")
        for part in ("unet", "vae", "scheduler"):
            if not (directory / part).is_dir():
                raise ModelNotUsable(
                    f"{directory} has no {part}/ folder; only pipelines with UNet, VAE and scheduler fit"
                )
        options = {"use_safetensors": True, "local_files_only": True}
        try:
            unet = UNet2DConditionModel.from_pretrained(directory / "unet", **options)
            vae = AutoencoderKL.from_pretrained(directory / "vae", **options)
            schedule = DDPMScheduler.from_pretrained(directory / "scheduler")
        except OSError as error:
            raise ModelNotUsable(f"{directory} cannot be loaded: {error}") from error
        if schedule.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ModelNotUsable(f"prediction type {schedule.config.prediction_type!r} has no denoising loss here")
        text = _load_text(directory, device)
        frozen = [module.eval().requires_grad_(False).to(device) for module in (unet, vae)]
        return cls(directory, frozen[0], frozen[1], schedule, text, device)

    # -- images and prompts -------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Latents [n, c, h, w] (the posterior's mean, scaled): the same picture gives the same latent."""
        latents = []
        for start in range(0, len(images), 64):
            pixels = torch.stack([self._to_pixels(image) for image in images[start : start + 64]]).to(self.device)
            mean = self.vae.encode(pixels).latent_dist.mean
            shift = self.vae.config.get("shift_factor") or 0.0
            latents.append((mean - shift) * self.vae.config.scaling_factor)
        return torch.cat(latents) if latents else torch.empty(0, *self.latent_shape, device=self.device)

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> list[Image.Image]:
        """Pictures of latents [n, c, h, w]."""
        shift = self.vae.config.get("shift_factor") or 0.0
        pictures: list[Image.Image] = []
        for chunk in latents.split(64):
            pixels = self.vae.decode(chunk / self.vae.config.scaling_factor + shift).sample
            array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            pictures.extend(Image.fromarray(picture) for picture in array)
        return pictures

    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Token states [n, tokens, dim] of the frozen text encoder."""
        return self.text(list(prompts))

    def _to_pixels(self, image: Image.Image) -> torch.Tensor:
        side = self.image_side
        resized = image.convert("RGB").resize((side, side), Image.Resampling.BOX)
        return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 127.5 - 1

    # -- the denoising loss -------------------------------------------------------------------

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (FastGDA, appendix A.1); [n, c, h, w]."""
        abar = self._alphas_cumprod[timesteps][:, None, None, None]
        return abar.sqrt() * latents + (1 - abar).sqrt() * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the UNet is trained to predict: eps, or v = sqrt(abar) eps - sqrt(1 - abar) x_0."""
        if self.schedule.config.prediction_type == "epsilon":
            return noise
        abar = self._alphas_cumprod[timesteps][:, None, None, None]
        return abar.sqrt() * noise - (1 - abar).sqrt() * latents

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The UNet's output [n, c, h, w]; differentiable with respect to its weights."""
        return cast(torch.Tensor, self.unet(noisy, timesteps, encoder_hidden_states=states, return_dict=False)[0])

    def denoising_loss(
        self, latents: torch.Tensor, states: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Mean squared error per sample, averaged over c, h, w as the published code does; [n]."""
        output = self.predict(self.add_noise(latents, noise, timesteps), timesteps, states)
        return (output - self.target(latents, noise, timesteps)).pow(2).flatten(1).mean(1)

    # -- sampling -----------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int = 50,
        guidance: float = 3.0,
        progress: Callable[[int, int], None] | None = None,
        batch: int = 64,
    ) -> list[Image.Image]:
        """DDIM samples with classifier-free guidance, one per (prompt, seed).

        Each image's noise comes from its own seed, so it does not depend on the batch it is in.
        """
        from diffusers import DDIMScheduler

        sampler = DDIMScheduler.from_config(self.schedule.config, clip_sample=False, set_alpha_to_one=True)
        sampler.set_timesteps(steps)
        pictures: list[Image.Image] = []
        for start in range(0, len(prompts), batch):
            chunk = list(prompts[start : start + batch])
            x = torch.stack(
                [
                    torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(int(seed)))
                    for seed in seeds[start : start + batch]
                ]
            ).to(self.device)
            states = torch.cat([self.encode_prompts([""] * len(chunk)), self.encode_prompts(chunk)])
            for t in sampler.timesteps:
                times = t.expand(2 * len(chunk)).to(self.device)
                free, conditional = self.predict(torch.cat([x, x]), times, states).chunk(2)
                x = sampler.step(free + guidance * (conditional - free), int(t), x).prev_sample
            pictures.extend(self.decode_latents(x))
            if progress:
                progress(min(start + batch, len(prompts)), len(prompts))
        return pictures

    # -- features -----------------------------------------------------------------------------

    @torch.no_grad()
    def mid_block_features(
        self, latents: torch.Tensor, states: torch.Tensor, timesteps: Sequence[int], seed: int
    ) -> torch.Tensor:
        """The UNet's mid-block activations, averaged over space and ``timesteps``; [n, channels * 2].

        Mean and standard deviation over space. The noise of a timestep is the same for every
        picture, so two pictures differ in what they show, not in the noise they were given.
        """
        collected: list[torch.Tensor] = []
        handle = self.unet.mid_block.register_forward_hook(lambda _m, _i, output: collected.append(output))
        try:
            features = []
            for chunk, chunk_states in zip(latents.split(64), states.split(64), strict=True):
                total = torch.zeros(())
                for t in timesteps:
                    noise = torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(seed * 1009 + t))
                    times = torch.full((len(chunk),), t, device=self.device, dtype=torch.long)
                    noise = noise.to(self.device).expand_as(chunk)
                    collected.clear()
                    self.predict(self.add_noise(chunk, noise, times), times, chunk_states)
                    flat = collected[0].flatten(2)  # [n, channels, h * w]
                    total = total.to(flat) + torch.cat([flat.mean(2), flat.std(2)], dim=1)
                features.append(total / len(timesteps))
        finally:
            handle.remove()
        return torch.cat(features)


def _load_text(directory: Path, device: str) -> TextEncoding:
    """The text encoder named by ``byline.json``, else the pipeline's own (CLIP or another)."""
    own = directory / "byline.json"
    if own.exists():
        settings = json.loads(own.read_text())
        if settings.get("text_encoder") != "minilm":
            raise ModelNotUsable(
                f"{own}: text_encoder {settings.get('text_encoder')!r} is unknown; 'minilm' is the one"
            )
        return load_minilm(int(settings["max_tokens"]), device)
    if not (directory / "text_encoder").is_dir():
        raise ModelNotUsable(f"{directory} has neither byline.json nor a text_encoder/ folder")
    from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModel

    folder = directory / "text_encoder"
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    kind = CLIPTextModel if "clip" in config.model_type else AutoModel
    encoder = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer", local_files_only=True)
    limit = min(int(tokenizer.model_max_length), int(config.max_position_embeddings))
    return TextEncoding(encoder.eval().requires_grad_(False).to(device), tokenizer, limit, device)
