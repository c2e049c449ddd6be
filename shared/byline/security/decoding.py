"""Untrusted bytes to RGB pixels through a child process that may do nothing else.

Why it exists: a hole in an image decoder must not be a hole in a worker, which holds the database's password and the
models. Formats, bytes, pixels and frames are checked as everywhere (``byline.catalog.decode``); memory, time and power
are bounded by the child (``decoder_child``). Only raw pixels of the expected size come back, which nobody parses.
"""

from __future__ import annotations

import json
import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import structlog
from PIL import Image

from byline.catalog.sniff import MAX_BYTES, MAX_PIXELS, ImageHeader, sniff
from byline.errors import BylineError, ImageTooLarge, ImageUndecodable

log = structlog.get_logger(__name__)

#: For 25 million pixels with transparency and rotation about 500 MiB are needed.
MEMORY_BYTES = 1024 * 1024 * 1024
#: Of one image, start of a child included; the largest allowed ones take about a second.
TIMEOUT_S = 30.0
_LENGTH = struct.Struct(">I")
_MAX_HEAD = 64 * 1024
#: Of the environment only what Python needs to find its packages: no settings, so no passwords.
_PASSED_ON = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LANG", "LD_LIBRARY_PATH", "TZ")


class BoundedDecoder:
    """A decoding child, started when first needed and again after it was lost. Thread-safe, one image at a time."""

    def __init__(
        self, memory_bytes: int = MEMORY_BYTES, timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._memory_bytes = memory_bytes
        self._timeout_s = timeout_s
        self._clock = clock
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        #: Whether the child's system calls are filtered; None before it was started.
        self.filtered: bool | None = None

    def decode(
        self, data: bytes, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS, field: str = "image"
    ) -> Image.Image:
        """As ``byline.catalog.decode.decode_image``: ImageTooLarge, ImageUndecodable; the latter also for an image that
        the decoder cannot manage within its memory and time, or dies of."""
        header = sniff(data, max_bytes, max_pixels, field)
        asked = {"size": len(data), "max_bytes": max_bytes, "max_pixels": max_pixels, "field": field}
        with self._lock:
            try:
                told, pixels = self._again(asked, data, 3 * header.width * header.height)
            except (OSError, EOFError, ValueError, TimeoutError) as error:
                status = self._kill()
                log.warning("decoder_lost", error=type(error).__name__, status=status, bytes=len(data))
                raise ImageUndecodable(
                    field, "the image cannot be decoded within the limits on memory and time"
                ) from error
        if "reason" in told:
            raise _error(told, field)
        return _picture(told, pixels, header, field)

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._kill()

    def _again(self, asked: dict[str, Any], data: bytes, most: int) -> tuple[dict[str, Any], bytes]:
        """A child that died may have died of anything: only an image that two of them die of is to blame."""
        try:
            return self._exchange(asked, data, most)
        except (BrokenPipeError, EOFError):
            log.info("decoder_started_again", status=self._kill())
            return self._exchange(asked, data, most)

    def _exchange(self, asked: dict[str, Any], data: bytes, most: int) -> tuple[dict[str, Any], bytes]:
        deadline = self._clock() + self._timeout_s
        child = self._running(deadline)
        assert child.stdin is not None and child.stdout is not None  # noqa: S101 - both are pipes
        head = json.dumps(asked).encode()
        self._write(child.stdin.fileno(), memoryview(_LENGTH.pack(len(head)) + head + data), deadline)
        return self._read_frame(child.stdout.fileno(), most, deadline)

    def _running(self, deadline: float) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self._kill()
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        environment.setdefault("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        self._child = subprocess.Popen(
            [sys.executable, "-m", "byline.security.decoder_child", str(self._memory_bytes), str(self._timeout_s)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, cwd="/",
            start_new_session=True,
        )  # fmt: skip
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None  # noqa: S101
            os.set_blocking(pipe.fileno(), False)
        assert self._child.stdout is not None  # noqa: S101
        told, _ = self._read_frame(self._child.stdout.fileno(), 0, deadline)
        self.filtered = bool(told.get("filtered"))
        if not self.filtered:
            log.warning("decoder_not_filtered", advice="the kernel or container allows no seccomp filter")
        return self._child

    def _read_frame(self, pipe: int, most: int, deadline: float) -> tuple[dict[str, Any], bytes]:
        (length,) = _LENGTH.unpack(self._read(pipe, _LENGTH.size, deadline))
        if length > _MAX_HEAD:
            raise ValueError("the decoder's answer is no answer")
        told = json.loads(self._read(pipe, length, deadline))
        size = told.get("size", 0)
        if not isinstance(size, int) or not 0 <= size <= most:
            raise ValueError("the decoder's answer has another size than its image")
        return told, self._read(pipe, size, deadline)

    def _write(self, pipe: int, data: memoryview, deadline: float) -> None:
        while data:
            self._wait(pipe, select.POLLOUT, deadline)
            data = data[os.write(pipe, data) :]

    def _read(self, pipe: int, size: int, deadline: float) -> bytes:
        found = bytearray()
        while len(found) < size:
            self._wait(pipe, select.POLLIN, deadline)
            part = os.read(pipe, min(size - len(found), 1 << 20))
            if not part:
                raise EOFError("the decoder ended")
            found += part
        return bytes(found)

    def _wait(self, pipe: int, event: int, deadline: float) -> None:
        waiting = select.poll()
        waiting.register(pipe, event)
        if not waiting.poll(max(0.0, 1e3 * (deadline - self._clock()))):
            raise TimeoutError("the decoder takes too long")

    def _kill(self) -> int | None:
        child, self._child = self._child, None
        if child is None:
            return None
        child.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        return child.wait(10)


def _error(told: dict[str, Any], field: str) -> BylineError:
    """The child's refusal; of its words only those that this code could have said."""
    kind = ImageTooLarge if told.get("reason") == ImageTooLarge.reason else ImageUndecodable
    message = str(told.get("message") or "")[:300].removeprefix(f"{field}: ")
    return kind(field, message or "the image cannot be decoded within the limits on memory and time")


def _picture(told: dict[str, Any], pixels: bytes, header: ImageHeader, field: str) -> Image.Image:
    size = (told.get("width"), told.get("height"))
    if size not in ((header.width, header.height), (header.height, header.width)) or len(pixels) != 3 * (
        header.width * header.height
    ):
        raise ImageUndecodable(field, "the image's header and contents disagree about its size")
    return Image.frombytes("RGB", size, pixels)


_decoders: dict[int, BoundedDecoder] = {}
_starting = threading.Lock()


def decode_untrusted(
    data: bytes, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS, field: str = "image"
) -> Image.Image:
    """``BoundedDecoder.decode`` by this process's own decoder (a forked process gets another one)."""
    with _starting:
        decoder = _decoders.get(os.getpid())
        if decoder is None:
            decoder = _decoders[os.getpid()] = BoundedDecoder()
    return decoder.decode(data, max_bytes, max_pixels, field)
