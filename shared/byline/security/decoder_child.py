"""The program that decodes one untrusted image after another, with as little power as a process can have.

Why it exists: image decoders are written in C and read whatever strangers send. Here they run with bounded memory and
time, without the parent's environment, and (Linux on x86-64 and ARM) behind a filter that lets no file be opened, no
connection be made and no program be started: what takes over this process can spoil its own pictures.

Speaks over stdin and stdout: a frame is four bytes of length, that much JSON, and the payload whose size the JSON says.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
from typing import Any, BinaryIO

_LENGTH = struct.Struct(">I")
#: Files that are open when work begins: the two pipes, stderr and what Python keeps.
_OPEN_FILES = 16


def main() -> None:
    """Serve frames until stdin ends. Arguments: bytes of memory, seconds of processor time for one image."""
    memory, seconds = int(sys.argv[1]), float(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    inbox, outbox = sys.stdin.buffer, sys.stdout.buffer
    _warm_up()
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))
    from byline.security.seccomp import renounce

    _send(outbox, {"ready": True, "filtered": renounce()}, b"")
    while (frame := _receive(inbox)) is not None:
        spent = resource.getrusage(resource.RUSAGE_SELF)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(spent.ru_utime + spent.ru_stime + seconds) + 1, hard))
        _send(outbox, *_decode(*frame))


def _decode(asked: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    from byline.catalog.decode import decode_image
    from byline.errors import InvalidRequest

    try:
        image = decode_image(data, asked["max_bytes"], asked["max_pixels"], asked["field"])
        pixels = image.tobytes()
    except InvalidRequest as error:
        return {"reason": error.reason, "message": error.message, "metadata": error.metadata, "size": 0}, b""
    except MemoryError:
        return {"reason": "IMAGE_UNDECODABLE", "message": "", "metadata": {}, "size": 0}, b""
    return {"width": image.width, "height": image.height, "size": len(pixels)}, pixels


def _warm_up() -> None:
    """Load everything decoding may ever need, for no file can be opened later."""
    import codecs
    import io

    from PIL import Image, JpegImagePlugin, MpoImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

    from byline.catalog.decode import decode_image

    assert JpegImagePlugin and MpoImagePlugin and PngImagePlugin and TiffImagePlugin and WebPImagePlugin  # noqa: S101
    for name in ("ascii", "latin-1", "utf-8", "utf-16", "utf-16-le", "utf-16-be", "cp1252"):
        codecs.lookup(name)
    exif = Image.Exif()
    exif[0x0112] = 6
    samples: tuple[tuple[str, dict[str, Any]], ...] = (
        ("PNG", {}), ("JPEG", {"exif": exif}), ("WEBP", {"exif": exif}), ("WEBP", {"lossless": True}),
    )  # fmt: skip
    for kind, options in samples:
        buffer = io.BytesIO()
        Image.new("RGBA" if kind != "JPEG" else "RGB", (3, 2)).save(buffer, kind, **options)
        decode_image(buffer.getvalue())


def _receive(inbox: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    head = inbox.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    asked = json.loads(inbox.read(_LENGTH.unpack(head)[0]))
    data = inbox.read(asked["size"])
    return (asked, data) if len(data) == asked["size"] else None


def _send(outbox: BinaryIO, told: dict[str, Any], payload: bytes) -> None:
    head = json.dumps(told).encode()
    outbox.write(_LENGTH.pack(len(head)) + head)
    outbox.write(payload)
    outbox.flush()


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the parent is gone
        os._exit(0)
