"""The image boundary: what is accepted, and that every refusal is one of two typed errors."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image

from byline.catalog.decode import decode_image, sniff
from byline.errors import ImageTooLarge, ImageUndecodable


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def picture(mode: str = "RGB", size: tuple[int, int] = (37, 21)) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


ACCEPTED = {
    "png": encoded(picture(), "PNG"),
    "jpeg": encoded(picture(), "JPEG"),
    "progressive jpeg": encoded(picture(), "JPEG", progressive=True),
    "lossy webp": encoded(picture(), "WEBP"),
    "lossless webp": encoded(picture(), "WEBP", lossless=True),
    "webp with alpha": encoded(picture("RGBA"), "WEBP"),
    "webp with exif": encoded(picture(), "WEBP", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x00\x00\x00\x00"),
}


@pytest.mark.parametrize("data", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_the_header_tells_the_size_that_decoding_finds(data: bytes) -> None:
    header = sniff(data)
    assert (header.width, header.height) == (37, 21)
    decoded = decode_image(data)
    assert (decoded.size, decoded.mode) == ((37, 21), "RGB")


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused_even_where_the_library_could_read_them(kind: str) -> None:
    with pytest.raises(ImageUndecodable):
        decode_image(encoded(picture(), kind))


def test_limits_on_bytes_and_pixels_hold_before_decoding() -> None:
    data = ACCEPTED["png"]
    with pytest.raises(ImageTooLarge):
        sniff(data, max_bytes=len(data) - 1)
    with pytest.raises(ImageTooLarge):
        sniff(data, max_pixels=37 * 21 - 1)
    bomb = bytearray(data)
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    with pytest.raises(ImageTooLarge):
        decode_image(bytes(bomb))


def test_a_damaged_image_is_a_typed_error_and_never_anything_else() -> None:
    rng = random.Random(7)
    for data in ACCEPTED.values():
        for _ in range(60):
            broken = bytearray(data[: rng.randrange(len(data))] if rng.random() < 0.5 else data)
            for _ in range(rng.randrange(1, 6)):
                if broken:
                    broken[rng.randrange(len(broken))] = rng.randrange(256)
            try:
                assert decode_image(bytes(broken)).mode == "RGB"
            except (ImageUndecodable, ImageTooLarge) as error:
                assert error.field == "image"


def test_a_truncated_image_is_refused() -> None:
    for name in ("png", "jpeg", "lossless webp"):
        data = ACCEPTED[name]
        with pytest.raises(ImageUndecodable):
            decode_image(data[: len(data) * 2 // 3])


def test_an_animation_is_refused() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for kind in ("PNG", "WEBP"):
        with pytest.raises(ImageUndecodable):
            decode_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))


def test_transparency_becomes_white_and_rotation_is_applied() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert decode_image(encoded(clear, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    assert decode_image(encoded(palette, "PNG", transparency=0)).getpixel((1, 1)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = decode_image(encoded(picture(), "JPEG", exif=exif))
    assert upright.size == (21, 37)
    assert not upright.info


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    grey = Image.fromarray(np.full((4, 4), 32_768, dtype=np.uint16))
    value = decode_image(encoded(grey, "PNG")).getpixel((0, 0))
    assert value == (128, 128, 128)
