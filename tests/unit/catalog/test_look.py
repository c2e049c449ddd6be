"""Copies are recognised, other pictures are not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from byline.catalog.look import HASH_BITS, Look, differing_bits, is_copy, look_of


def picture(seed: int) -> Image.Image:
    """A few coloured blobs on white, 96 x 96."""
    rng = np.random.default_rng(seed)
    pixels = np.full((96, 96, 3), 255.0)
    rows, columns = np.mgrid[:96, :96]
    for _ in range(5):
        x, y, r = rng.uniform(10, 86, 2).tolist() + [rng.uniform(8, 30)]
        pixels[(rows - y) ** 2 + (columns - x) ** 2 < r**2] = rng.uniform(0, 255, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def _same(one: Look, other: Look) -> bool:
    return differing_bits(one.hash, other.hash) <= HASH_BITS and is_copy(one.thumbnail, other.thumbnail)


def _jpeg(image: Image.Image) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=40)
    return Image.open(io.BytesIO(out.getvalue()))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "copy", [_jpeg, lambda p: p.resize((150, 150)), lambda p: p.resize((60, 60)), lambda p: p.copy()],
    ids=["jpeg", "larger", "smaller", "same"],
)  # fmt: skip
def test_a_picture_saved_again_or_scaled_is_a_copy(copy, seed: int):
    assert _same(look_of(copy(picture(seed))), look_of(picture(seed)))


def test_a_mirrored_picture_is_a_copy_of_its_mirror_image():
    look = look_of(ImageOps.mirror(picture(3)))
    assert not _same(look, look_of(picture(3)))
    assert _same(look.mirrored(), look_of(picture(3)))


def test_other_pictures_are_no_copies():
    looks = [look_of(picture(seed)) for seed in range(40)]
    assert not [(a, b) for a in range(40) for b in range(a) if _same(looks[a], looks[b])]


def test_a_hash_fits_postgres_bigint():
    assert all(0 <= look_of(picture(seed)).hash < 2**63 for seed in range(20))
