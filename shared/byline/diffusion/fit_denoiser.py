"""Train the demo's text-conditioned denoiser on the latents of the corpus.

Why it exists: attribution needs a model whose training images are known, exactly and completely.
DDPM training of a diffusers UNet2DConditionModel with cross-attention on frozen MiniLM token
states, v-prediction on a cosine schedule, 10 % caption dropout for classifier-free guidance, EMA.

    python -m byline.diffusion.fit_denoiser --corpus data/openclipart/items.parquet --out data/generator

Resumes from ``<out>/.training/denoiser.safetensors``; writes ``<out>/unet`` at every checkpoint, so
the best model so far is always there. The loop itself, ``train``, takes any subset of a corpus and
any seed: retraining without some images (``byline.evaluation.retraining``) is the same loop.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

from byline.diffusion.fit_autoencoder import load_pixels
from byline.diffusion.text_encoding import load_minilm
from byline.diffusion.training_state import load_state, save_state

log = logging.getLogger(__name__)
MAX_TOKENS = 16


def build_denoiser() -> UNet2DConditionModel:
    """4.3 M parameters; cross-attention on 4 x 4 where text meets layout at the least cost."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=384,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_schedule() -> DDPMScheduler:
    """1000 steps of the cosine schedule, v-prediction."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
    )


def write_pipeline_files(out: Path, schedule: DDPMScheduler) -> None:
    """The files that make ``out`` a diffusers pipeline directory; the text encoder is a package."""
    schedule.save_pretrained(out / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": [None, None],
        "tokenizer": [None, None],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    encoding = {"text_encoder": "minilm", "max_tokens": MAX_TOKENS}
    (out / "byline.json").write_text(json.dumps(encoding, indent=2) + "\n")


@dataclass(frozen=True)
class TrainingSet:
    """Frozen encodings of the images to train on.

    ``latents`` [n, c, h, w]; ``states`` [captions, tokens, dim] of the distinct captions; ``caption_row``
    int64 [n], which of them belongs to an image; ``empty`` [tokens, dim], the state of no caption.
    """

    latents: torch.Tensor
    states: torch.Tensor
    caption_row: torch.Tensor
    empty: torch.Tensor

    def only(self, rows: torch.Tensor) -> TrainingSet:
        """The images ``rows`` alone, int64 [m] in the order given."""
        return TrainingSet(self.latents[rows], self.states, self.caption_row[rows], self.empty)


@dataclass(frozen=True)
class Recipe:
    """How to train: batches, learning rate, and the seed of order, noise and caption dropout.

    The rate rises over ``warm_up`` steps, is constant, and falls linearly to 2 % over the last share ``decay``.
    ``bf16``: autocast of the forward pass.
    """

    steps: int
    batch: int
    rate: float
    seed: int
    warm_up: int = 500
    decay: float = 0.2
    dropout: float = 0.1
    bf16: bool = True
    save_every: int = 1000


def train(
    model: UNet2DConditionModel,
    schedule: DDPMScheduler,
    data: TrainingSet,
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    minutes: float = float("inf"),
    device: str = "cpu",
    saved: Callable[[dict[str, torch.Tensor]], None] = lambda average: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, torch.Tensor]:
    """Train ``model`` in place for ``recipe.steps`` batches or ``minutes``; return the running average of its weights.

    The batch of a step depends on seed and step alone. With ``checkpoint`` the run resumes there and ``saved`` is
    called with the average whenever a checkpoint is written. ``progress(step, steps)`` is called after every step and
    may raise to stop the run.
    """
    model.to(device, memory_format=torch.channels_last).train()
    latents, states, empty = data.latents.to(device), data.states.to(device), data.empty.to(device)
    optimiser = torch.optim.AdamW(model.parameters(), recipe.rate, weight_decay=1e-3, betas=(0.9, 0.99))
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    step, spent = 0, 0.0
    if checkpoint is not None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        step, spent = load_state(checkpoint, model, optimiser, average) if checkpoint.exists() else (0, 0.0)
    began = time.monotonic()
    running = 0.0
    while step < recipe.steps and time.monotonic() - began < minutes * 60:
        draw = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        # Epochs by permutation: every image is seen equally often.
        epoch, place = divmod(step * recipe.batch, len(latents))
        order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(recipe.seed * 7919 + epoch))
        chosen = order.repeat(2 + recipe.batch // len(latents))[place : place + recipe.batch]
        x0 = latents[chosen]
        dropped = torch.rand(recipe.batch, generator=draw) < recipe.dropout
        condition = torch.where(dropped[:, None, None].to(device), empty, states[data.caption_row[chosen]])
        noise = torch.randn(x0.shape, generator=draw).to(device)
        t = torch.randint(0, schedule.config.num_train_timesteps, (recipe.batch,), generator=draw).to(device)
        noisy = schedule.add_noise(x0, noise, t).contiguous(memory_format=torch.channels_last)
        velocity = schedule.config.prediction_type == "v_prediction"
        target = schedule.get_velocity(x0, noise, t) if velocity else noise
        for group in optimiser.param_groups:
            # Constant, then linear decay at the end: the run may be extended before that.
            left = (recipe.steps - step) / (recipe.decay * recipe.steps)
            group["lr"] = recipe.rate * min(1.0, (step + 1) / recipe.warm_up, max(0.02, left))
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=recipe.bf16):
            output = model(noisy, t, condition).sample
        loss = (output.float() - target).pow(2).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        decay = min(0.9995, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            average[name].lerp_(value, 1 - decay)
        running = 0.99 * running + 0.01 * loss.item() if running else loss.item()
        stopping = step == recipe.steps or time.monotonic() - began >= minutes * 60
        if step % 100 == 0:
            log.info(
                "denoiser step %d/%d epoch %d loss %.4f %.0fs",
                step, recipe.steps, epoch, running, spent + time.monotonic() - began,
            )  # fmt: skip
        if checkpoint is not None and (step % recipe.save_every == 0 or stopping):
            save_state(checkpoint, step, model, optimiser, average, spent + time.monotonic() - began)
            saved(average)
        progress(step, recipe.steps)
    return average


def encode_corpus(corpus: Path, vae: Any) -> TrainingSet:
    """Latents and MiniLM states of all images of a corpus file."""
    captions = pq.read_table(corpus, columns=["caption"]).column("caption").to_pylist()
    with torch.no_grad():
        pixels = load_pixels(corpus, vae.config.sample_size)
        latents = torch.cat([vae.encode(p).latent_dist.mean for p in pixels.split(256)]) * vae.config.scaling_factor
        text = load_minilm(MAX_TOKENS)
        distinct = list(dict.fromkeys(captions))
        states = torch.cat([text(distinct[i : i + 64]) for i in range(0, len(distinct), 64)])  # [c, tokens, dim]
    row = {c: i for i, c in enumerate(distinct)}
    return TrainingSet(latents, states, torch.tensor([row[c] for c in captions]), text([""])[0])


def fit(
    corpus: Path, out: Path, steps: int, batch: int, rate: float, seed: int, threads: int, minutes: float
) -> UNet2DConditionModel:
    """Train up to ``steps`` batches or ``minutes`` of this run, whichever is first; save the EMA."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    data = encode_corpus(corpus, AutoencoderKL.from_pretrained(out / "vae").eval())
    schedule = build_schedule()
    write_pipeline_files(out, schedule)
    model, exported = build_denoiser(), build_denoiser()

    def export(average: dict[str, torch.Tensor]) -> None:
        exported.load_state_dict(average)
        exported.save_pretrained(out / "unet")

    train(model, schedule, data, Recipe(steps, batch, rate, seed), minutes=minutes, saved=export,
          checkpoint=out / ".training" / "denoiser.safetensors")  # fmt: skip
    return exported


def main() -> None:
    """Train the denoiser from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop this run after so many minutes")
    arguments = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fit(**arguments)


if __name__ == "__main__":
    main()
