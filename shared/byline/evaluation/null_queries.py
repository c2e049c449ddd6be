"""Null queries: pictures that the model did not make from the prompt that comes with them.

Why it exists: "not attributable" has to be measured on questions whose honest answer it is. Nobody may be asked to
collect them, so they are made here, the same on every machine: photographs (crops of the two that scikit-learn
ships), drawings by a program (the hardest in style: flat shapes on white, like the demo's corpus), images of
another model (the generator with its weights disturbed beyond recognition), noise through the model's own decoder.
Prompts are captions of the corpus: all else about the question is as real as can be.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from byline.diffusion.model import DiffusionModel

PHOTOGRAPH, DRAWING, OTHER_MODEL, DECODED_NOISE = "photograph", "drawing", "other_model", "decoded_noise"
KINDS = (PHOTOGRAPH, DRAWING, OTHER_MODEL, DECODED_NOISE)
#: Changes when the same arguments would give other pictures: part of every cache key.
RECIPE = 1
#: Standard deviation of the disturbance of a weight, in those of its tensor: contours stay, contents go.
DISTURBANCE = 0.6
SAMPLING_STEPS = 20
_CANVAS = 256


@dataclass(frozen=True)
class NullQuery:
    """``source`` says what it was made from: nulls of one source must not lie on both sides of a split."""

    kind: str
    source: str
    image: Image.Image
    prompt: str


def make_null_queries(model: DiffusionModel, prompts: Sequence[str], *, per_kind: int, seed: int) -> list[NullQuery]:
    """``per_kind`` null queries of each of ``KINDS``, deterministic in model, prompts and seed.

    ``prompts`` are used in turn. The model is left as it was.
    """
    rng = np.random.default_rng(seed)
    side = model.image_side
    asked = [prompts[int(place)] for place in rng.integers(0, len(prompts), len(KINDS) * per_kind)]
    made: list[NullQuery] = []

    def add(kind: str, pictures: Sequence[Image.Image], sources: Sequence[str]) -> None:
        for picture, source in zip(pictures, sources, strict=True):
            made.append(NullQuery(kind, source, picture, asked[len(made)]))

    photographs = _photographs()
    names = [sorted(photographs)[number % len(photographs)] for number in range(per_kind)]
    add(PHOTOGRAPH, [_crop(photographs[name], side, rng) for name in names], names)
    drawn = [f"drawing {number}" for number in range(per_kind)]
    add(DRAWING, [_drawing(side, rng) for _ in drawn], drawn)
    start = len(made)
    seeds = [seed * 100_003 + number for number in range(per_kind)]
    pictures = disturbed(model, seed).generate(asked[start : start + per_kind], seeds, steps=SAMPLING_STEPS)
    add(OTHER_MODEL, pictures, [f"disturbed {number}" for number in range(per_kind)])
    noise = torch.randn((per_kind, *model.latent_shape), generator=torch.Generator().manual_seed(seed))
    add(DECODED_NOISE, model.decode_latents(noise.to(model.device)), [f"noise {n}" for n in range(per_kind)])
    return made


def disturbed(model: DiffusionModel, seed: int) -> DiffusionModel:
    """A copy of the model whose weight matrices have noise added; text encoder, decoder and schedule are shared."""
    other = copy.copy(model)
    other.unet = copy.deepcopy(model.unet)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.unet.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter += DISTURBANCE * parameter.std() * noise
    return other


def with_other_prompts(rankings: Sequence[Any]) -> list[Any]:
    """Real queries, each with the prompt of the one half the list further on (any dataclass with ``prompt``).

    Not nulls in the strict sense, for the image *is* the model's: reported apart, and never fitted on.
    """
    shift = max(1, len(rankings) // 2)
    prompts = [ranking.prompt for ranking in rankings]
    swapped = [replace(r, prompt=prompts[(n + shift) % len(prompts)]) for n, r in enumerate(rankings)]
    return [new for new, old in zip(swapped, rankings, strict=True) if new.prompt != old.prompt]


def _photographs() -> dict[str, Image.Image]:
    from sklearn.datasets import load_sample_images

    found = load_sample_images()
    return {f"photograph {n}": Image.fromarray(np.asarray(pixels)) for n, pixels in enumerate(found.images)}


def _crop(picture: Image.Image, side: int, rng: np.random.Generator) -> Image.Image:
    """A square of a quarter to all of the shorter edge, scaled to ``side`` pixels."""
    width, height = picture.size
    edge = int(min(width, height) * rng.uniform(0.25, 1.0))
    left, top = int(rng.integers(0, width - edge + 1)), int(rng.integers(0, height - edge + 1))
    box = (left, top, left + edge, top + edge)
    return picture.crop(box).resize((side, side), Image.Resampling.BOX)


def _drawing(side: int, rng: np.random.Generator) -> Image.Image:
    """Two to six filled shapes in random colours on white."""
    picture = Image.new("RGB", (_CANVAS, _CANVAS), "white")
    pen = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(2, 7))):
        colour = tuple(int(part) for part in rng.integers(0, 256, 3))
        (left, right), (top, bottom) = np.sort(rng.integers(0, _CANVAS, (2, 2)), axis=1).tolist()
        box, line, shape = (left, top, right + 1, bottom + 1), int(rng.integers(0, 6)), int(rng.integers(3))
        if shape == 0:
            pen.ellipse(box, fill=colour, outline="black", width=line)
        elif shape == 1:
            pen.rectangle(box, fill=colour, outline="black", width=line)
        else:
            corners = rng.integers(0, _CANVAS, (int(rng.integers(3, 8)), 2)).tolist()
            pen.polygon([(x, y) for x, y in corners], fill=colour)
    return picture.resize((side, side), Image.Resampling.BOX)
