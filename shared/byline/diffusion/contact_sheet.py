"""Samples of a generator beside the corpus images of the same captions, on one sheet.

Why it exists: whether a generator is good enough to attribute is judged by looking: does a person
recognise the caption in the sample?

    python -m byline.diffusion.contact_sheet --model data/generator --corpus data/openclipart/items.parquet \\
        --out data/generator/samples.png
"""

from __future__ import annotations

import argparse
import io
import textwrap
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw

from byline.diffusion.model import DiffusionModel

CELL, TEXT = 96, 34


def draw_sheet(
    model: DiffusionModel, captions: list[str], originals: list[Image.Image], *, seed: int, guidance: float, steps: int
) -> Image.Image:
    """Rows of: caption, corpus image (left), sample (right); six pairs a row."""
    samples = model.generate(captions, [seed + n for n in range(len(captions))], steps=steps, guidance=guidance)
    columns = 6
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (columns * (2 * CELL + 16), rows * (CELL + TEXT + 8)), "white")
    pen = ImageDraw.Draw(sheet)
    for n, (caption, original, sample) in enumerate(zip(captions, originals, samples, strict=True)):
        x, y = (n % columns) * (2 * CELL + 16), (n // columns) * (CELL + TEXT + 8)
        sheet.paste(original.resize((CELL, CELL), Image.Resampling.BICUBIC), (x, y))
        sheet.paste(sample.resize((CELL, CELL), Image.Resampling.BICUBIC), (x + CELL, y))
        for line, text in enumerate(textwrap.wrap(caption, 34)[:2]):
            pen.text((x + 2, y + CELL + 2 + 14 * line), text, fill="black")
    return sheet


def main() -> None:
    """Draw the sheet of randomly chosen captions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = pq.read_table(arguments.corpus, columns=["caption", "image"]).to_pylist()
    chosen = np.random.default_rng(arguments.seed).choice(len(table), arguments.count, replace=False)
    rows = [table[i] for i in chosen]
    originals = [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in rows]
    draw_sheet(
        DiffusionModel.load(arguments.model),
        [row["caption"] for row in rows],
        originals,
        seed=arguments.seed,
        guidance=arguments.guidance,
        steps=arguments.steps,
    ).save(arguments.out)


if __name__ == "__main__":
    main()
