"""Train the small autoencoder whose latents the demo generator denoises.

Why it exists: denoising 8 x 8 x 4 latents costs a quarter of what denoising 16 x 16 patches of
pixels does, in training and in every loss the teacher ever measures, and it makes the demo's
pipeline the same shape as Stable Diffusion's (VAE, UNet, text encoder), so one loader serves both.

    python -m byline.diffusion.fit_autoencoder --corpus data/openclipart/items.parquet --out data/generator

Resumes from ``<out>/.training/autoencoder.safetensors``.
"""

from __future__ import annotations

import argparse
import io
import logging
import math
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL
from PIL import Image

from byline.diffusion.training_state import load_state, save_state

log = logging.getLogger(__name__)


def build_autoencoder(side: int = 32) -> AutoencoderKL:
    """f = 4, eight latent channels: [n, 3, side, side] to [n, 8, side / 4, side / 4].

    With four channels outlines survived and colours did not (20.9 dB, green became grey).
    """
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=16,
        sample_size=side,
    )


def load_pixels(corpus: Path, side: int) -> torch.Tensor:
    """All images of a corpus file as [n, 3, side, side] in [-1, 1]."""
    rows = pq.read_table(corpus, columns=["image"]).column("image").to_pylist()
    pixels = np.stack(
        [
            np.asarray(Image.open(io.BytesIO(raw)).convert("RGB").resize((side, side), Image.Resampling.BOX))
            for raw in rows
        ]
    )  # [n, side, side, 3]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1, squared error, L1 of the image gradients and L1 of 4 x 4 means.

    Gradients keep outlines sharp; the squared error and the coarse means keep colours, which L1 alone
    lets fall to grey.
    """
    error = output - target
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    coarse = torch.nn.functional.avg_pool2d(error, 4).abs().mean()
    return error.abs().mean() + error.pow(2).mean() + 0.5 * edges + 2 * coarse


def fit(
    corpus: Path, out: Path, steps: int, batch: int, rate: float, kl_weight: float, seed: int, threads: int
) -> AutoencoderKL:
    """Train for ``steps`` batches, resuming where a previous run stopped; save to ``out/vae``."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    pixels = load_pixels(corpus, 32).contiguous(memory_format=torch.channels_last)
    model = build_autoencoder().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    checkpoint = out / ".training" / "autoencoder.safetensors"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    step, spent = load_state(checkpoint, model, optimiser, average) if checkpoint.exists() else (0, 0.0)
    started = time.monotonic() - spent
    running = 0.0
    while step < steps:
        # The batch of a step depends on the step alone, so a resumed run sees what the first would.
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
        target = pixels[torch.randint(len(pixels), (batch,), generator=draw)]
        if torch.rand((), generator=draw) < 0.5:
            target = target.flip(3)
        for group in optimiser.param_groups:
            warm = min(1.0, (step + 1) / 100)
            group["lr"] = rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=draw)
            output = model.decode(posterior.mean + posterior.std * noise).sample.float()
        loss = (
            reconstruction_loss(output, target) + kl_weight * posterior.kl().float().mean() / posterior.mean[0].numel()
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        decay = min(0.995, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            average[name].lerp_(value, 1 - decay)
        running = 0.98 * running + 0.02 * loss.item() if running else loss.item()
        if step % 50 == 0:
            log.info("autoencoder step %d/%d loss %.4f %.0fs", step, steps, running, time.monotonic() - started)
        if step % 200 == 0 or step == steps:
            save_state(checkpoint, step, model, optimiser, average, time.monotonic() - started)
    model.load_state_dict(average)
    with torch.no_grad():
        sample = torch.cat([model.encode(p).latent_dist.mean for p in pixels.split(256)])
    # Latents of unit variance: what the noise schedule of the denoiser assumes.
    model.register_to_config(scaling_factor=round(1 / sample.std().item(), 6), shift_factor=None)
    model.save_pretrained(out / "vae")
    with torch.no_grad():
        held = pixels[:512]
        mse = (model.decode(model.encode(held).latent_dist.mean).sample.clamp(-1, 1) - held).pow(2).mean().item()
    log.info("saved %s; PSNR %.2f dB; scaling factor %.4f", out / "vae", 10 * math.log10(4 / mse), 1 / sample.std())
    return model


def main() -> None:
    """Train the autoencoder from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--kl-weight", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fit(**arguments)


if __name__ == "__main__":
    main()
