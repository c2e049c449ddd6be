"""The decoding child: the same pixels, and no way to harm the process that asks."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from byline.catalog.decode import decode_image
from byline.errors import ImageTooLarge, ImageUndecodable
from byline.security.decoding import BoundedDecoder


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(mode: str = "RGB", size: tuple[int, int] = (37, 21)) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


ACCEPTED = {
    "png": encoded(picture(), "PNG"),
    "grey": encoded(picture("L"), "PNG"),
    "palette": encoded(picture("P"), "PNG", transparency=0),
    "alpha": encoded(picture("RGBA"), "PNG"),
    "sixteen bits": encoded(Image.fromarray(np.full((4, 4), 32_768, dtype=np.uint16)), "PNG"),
    "turned": encoded(picture(), "JPEG", exif=turned()),
    "cmyk": encoded(picture("CMYK"), "JPEG"),
    "progressive": encoded(picture(), "JPEG", progressive=True),
    "webp": encoded(picture(), "WEBP"),
    "lossless webp": encoded(picture("RGBA"), "WEBP", lossless=True, exif=turned()),
}


@pytest.fixture(scope="module")
def decoder() -> Iterator[BoundedDecoder]:
    decoder = BoundedDecoder()
    yield decoder
    decoder.close()


def child(decoder: BoundedDecoder) -> subprocess.Popen[bytes]:
    decoder.decode(ACCEPTED["png"])
    assert decoder._child is not None
    return decoder._child


@pytest.mark.parametrize("data", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_the_child_gives_the_very_pixels_that_decoding_here_gives(decoder: BoundedDecoder, data: bytes) -> None:
    here, there = decode_image(data), decoder.decode(data)
    assert (there.mode, there.size, there.tobytes()) == ("RGB", here.size, here.tobytes())


def test_refusals_are_those_of_decoding_here(decoder: BoundedDecoder) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    for data in (
        b"", b"GIF89a", ACCEPTED["png"][:60], encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    ):
        with pytest.raises(ImageUndecodable) as here:
            decode_image(data, field="query.image")
        with pytest.raises(ImageUndecodable) as there:
            decoder.decode(data, field="query.image")
        assert (str(here.value), here.value.metadata) == (str(there.value), there.value.metadata)
    with pytest.raises(ImageTooLarge):
        decoder.decode(ACCEPTED["png"], max_pixels=10)


def test_a_child_that_was_killed_costs_no_image(decoder: BoundedDecoder) -> None:
    child(decoder).kill()
    assert decoder.decode(ACCEPTED["png"]).size == (37, 21)


def test_an_image_that_takes_too_long_is_refused_and_the_next_one_is_decoded() -> None:
    decoder = BoundedDecoder(timeout_s=30.0)
    stopped = child(decoder)
    os.kill(stopped.pid, signal.SIGSTOP)
    decoder._timeout_s = 0.2
    with pytest.raises(ImageUndecodable, match="limits on memory and time"):
        decoder.decode(ACCEPTED["png"])
    assert stopped.poll() == -signal.SIGKILL
    decoder._timeout_s = 30.0
    assert decoder.decode(ACCEPTED["png"]).size == (37, 21)
    decoder.close()


def test_an_image_that_needs_more_memory_than_allowed_is_refused_and_harms_nobody() -> None:
    decoder = BoundedDecoder(memory_bytes=220 * 1024 * 1024)
    with pytest.raises(ImageUndecodable):
        decoder.decode(encoded(Image.new("RGBA", (5000, 5000)), "PNG"))
    assert decoder.decode(ACCEPTED["alpha"]).size == (37, 21)
    decoder.close()


def test_the_child_has_neither_settings_nor_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYLINE_DATABASE_URL", "postgresql://user:secret@host/db")
    decoder = BoundedDecoder()
    with open(f"/proc/{child(decoder).pid}/environ", "rb") as file:
        assert b"secret" not in file.read()
    decoder.close()


def test_many_threads_share_a_child_and_get_their_own_pictures(decoder: BoundedDecoder) -> None:
    wrong: list[int] = []

    def ask(number: int) -> None:
        data = encoded(Image.new("RGB", (number + 1, 3), (number, 0, 0)), "PNG")
        for _ in range(5):
            found = decoder.decode(data)
            if found.size != (number + 1, 3) or found.getpixel((0, 0)) != (number, 0, 0):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


ATTEMPTS = """
import os, socket, subprocess, sys
from byline.security.seccomp import renounce
if not renounce():
    print("no filter here"); sys.exit(0)
def refused(attempt):
    try:
        attempt()
    except PermissionError:
        return True
    return False
attempts = {
    "open": lambda: os.open("/etc/passwd", os.O_RDONLY), "socket": lambda: socket.socket(),
    "fork": os.fork, "exec": lambda: os.execv("/bin/true", ["true"]), "kill": lambda: os.kill(os.getppid(), 0),
    "unlink": lambda: os.unlink("/tmp/none"), "mkdir": lambda: os.mkdir("/tmp/none-such"),
}
print([name for name, attempt in attempts.items() if not refused(attempt)])
os.write(1, b"written\\n")
"""


def test_behind_the_filter_nothing_can_be_opened_connected_or_started() -> None:
    done = subprocess.run([sys.executable, "-c", ATTEMPTS], capture_output=True, text=True, timeout=120)
    if done.stdout.strip() == "no filter here":
        pytest.skip("the kernel allows no filter")
    assert done.stdout.split("\n")[:2] == ["written", "[]"] or done.stdout.split("\n")[:2] == ["[]", "written"], done
