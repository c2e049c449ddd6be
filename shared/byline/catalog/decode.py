"""Untrusted bytes to RGB pixels: three formats, bounded before anything is allocated.

Why it exists: a decoder is the largest attack surface of the system. The header is checked first
(``sniff``), only three of Pillow's parsers may run, a size that changes between header and decoder is
refused, and every way to fail becomes one typed error with no text from the decoder in it.
"""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageOps

from byline.catalog.sniff import MAX_BYTES, MAX_PIXELS, ImageHeader, sniff
from byline.errors import ImageUndecodable

__all__ = ["MAX_BYTES", "MAX_PIXELS", "ImageHeader", "decode_image", "sniff"]

_FORMATS = ("PNG", "JPEG", "WEBP")
# What Pillow raises for broken or hostile input, collected from its parsers; anything else is our bug.
_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, OverflowError, TypeError, MemoryError,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


def decode_image(
    data: bytes, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS, field: str = "image"
) -> Image.Image:
    """Decode PNG, JPEG or WebP bytes to an RGB image, upright (EXIF applied) and on white where transparent.

    Raises ImageTooLarge and ImageUndecodable (``field`` names the request's field); animations are refused.
    """
    header = sniff(data, max_bytes, max_pixels, field)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
                if opened.size != (header.width, header.height):
                    raise ImageUndecodable(field, "the image's header and contents disagree about its size")
                if getattr(opened, "n_frames", 1) != 1:
                    raise ImageUndecodable(field, "an animation has no single picture to attribute; send one frame")
                opened.load()
                return _to_rgb(ImageOps.exif_transpose(opened))
    except _BROKEN as error:
        raise ImageUndecodable(field, "the image is damaged or incomplete") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB without metadata; transparency is composited on white, 16-bit grey is scaled to 8 bits."""
    if image.mode.startswith("I"):
        image = image.point(lambda value: value / 256).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        flat = Image.new("RGBA", layer.size, "white")
        flat.alpha_composite(layer)
        image = flat
    rgb = image.convert("RGB")
    rgb.info.clear()
    return rgb


def encode_png(image: Image.Image) -> bytes:
    """Lossless PNG bytes of a picture: what a generated query is stored and submitted as."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
