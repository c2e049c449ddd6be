"""What an image claims to be, read from its first bytes without any image library.

Why it exists: the gateway must refuse what is not an image, or is too large, before a job exists, and
must not run a decoder on a client's bytes. Decoding happens in a worker (``byline.catalog.decode``).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from byline.errors import ImageTooLarge, ImageUndecodable, UnsupportedMediaType

MAX_BYTES = 8 * 1024 * 1024
MAX_PIXELS = 25_000_000

#: First bytes of formats that people do send, and what to call them.
_OTHERS = {
    b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"%PDF": "PDF", b"<svg": "SVG",
    b"<?xml": "SVG or XML", b"\0\0\1\0": "ICO", b"8BPS": "PSD", b"\0\0\0\x0cjP": "JPEG 2000", b"\xff\x0a": "JPEG XL",
}  # fmt: skip
_PNG = b"\x89PNG\r\n\x1a\n"
# Start-of-frame markers of JPEG: C0 … CF without the Huffman (C4), reserved (C8) and arithmetic (CC) tables.
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Format and size in pixels as the header states them."""

    media_type: str
    width: int
    height: int


def sniff(data: bytes, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS, field: str = "image") -> ImageHeader:
    """Format and dimensions from the header of a PNG, JPEG or WebP file; no pixel is decoded.

    Raises ImageTooLarge (bytes or pixels over the limit) and ImageUndecodable (a broken header, or as
    UnsupportedMediaType another format). ``field`` names the request's field in the error.
    """
    if len(data) > max_bytes:
        raise ImageTooLarge(
            field, f"{len(data)} bytes are over the limit of {max_bytes}", bytes=len(data), limit=max_bytes
        )
    try:
        header = _read_header(data)
    except (struct.error, IndexError) as error:
        raise ImageUndecodable(field, "the image's header is cut short") from error
    if header is None:
        for start, name in _OTHERS.items():
            if data.startswith(start):
                raise UnsupportedMediaType(field, f"{name} is not accepted; send PNG, JPEG or WebP", format=name)
        raise ImageUndecodable(field, "the bytes are not a PNG, JPEG or WebP image")
    if header.width < 1 or header.height < 1:
        raise ImageUndecodable(field, f"the header states {header.width}x{header.height} pixels")
    if header.width * header.height > max_pixels:
        raise ImageTooLarge(
            field,
            f"{header.width}x{header.height} pixels are over the limit of {max_pixels}",
            width=header.width, height=header.height, limit=max_pixels,
        )  # fmt: skip
    return header


def _read_header(data: bytes) -> ImageHeader | None:
    """The header, or None for an unknown format. struct.error or IndexError when it is cut short."""
    if data.startswith(_PNG):
        if data[12:16] != b"IHDR":
            return None
        width, height = struct.unpack_from(">II", data, 16)
        return ImageHeader("image/png", width, height)
    if data.startswith(b"\xff\xd8\xff"):
        return _read_jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _read_webp(data)
    return None


def _read_jpeg(data: bytes) -> ImageHeader | None:
    position = 2
    while True:
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker in _STANDALONE:
            position += 2
        elif marker in _START_OF_FRAME:
            height, width = struct.unpack_from(">HH", data, position + 5)
            return ImageHeader("image/jpeg", width, height)
        elif marker in (0xD9, 0xDA):  # end of image, or pixels before any frame header
            return None
        else:
            (length,) = struct.unpack_from(">H", data, position + 2)
            if length < 2:
                return None
            position += 2 + length


def _read_webp(data: bytes) -> ImageHeader | None:
    kind = data[12:16]
    if kind == b"VP8 ":
        if data[23:26] != b"\x9d\x01\x2a":
            return None
        width, height = struct.unpack_from("<HH", data, 26)
        return ImageHeader("image/webp", width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L":
        if data[20] != 0x2F:
            return None
        (bits,) = struct.unpack_from("<I", data, 21)
        return ImageHeader("image/webp", (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1)
    if kind == b"VP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
        if len(data) < 30:
            raise IndexError("VP8X header")
        return ImageHeader("image/webp", width, height)
    return None
