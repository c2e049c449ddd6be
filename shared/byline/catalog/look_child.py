"""Decode pictures of strangers in a child process: bounded in memory and time, replaced when it dies.

Why it exists: a decoder is the largest attack surface there is, and whoever adds items chooses the bytes. The parent
never decodes; it sends bytes and reads a look, or learns that there is none. Length-prefixed bytes one way, a line of
JSON the other.
"""

from __future__ import annotations

import json
import resource
import select
import struct
import subprocess
import sys
import threading
from typing import IO

from byline.catalog.look import Look
from byline.errors import ImageTooLarge, ImageUndecodable

_LENGTH = struct.Struct(">Q")
#: Address space of the child, bytes: 25 million pixels take 300 MB while they are turned and flattened.
_MEMORY = 2 * 1024**3


class LookChild:
    """``look`` of pictures, one at a time. Any thread. The child is started when first needed."""

    def __init__(self, timeout_s: float = 10.0) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def look(self, data: bytes, field: str = "image") -> Look:
        """The look of an encoded picture. ImageUndecodable (also if the child was slow or died), ImageTooLarge."""
        with self._lock:
            try:
                answer = self._ask(data)
            except (OSError, ValueError):
                self._end()
                raise ImageUndecodable(field, "decoding it took too long or broke the decoder") from None
        if "hash" in answer:
            return Look(int(answer["hash"]), bytes.fromhex(answer["thumbnail"]))
        kind = ImageTooLarge if answer.get("reason") == ImageTooLarge.reason else ImageUndecodable
        raise kind(field, str(answer.get("message", "")))

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._end()

    def _ask(self, data: bytes) -> dict[str, str]:
        if self._child is None or self._child.poll() is not None:
            self._end()
            self._child = subprocess.Popen(
                [sys.executable, "-m", "byline.catalog.look_child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        asked, answered = self._child.stdin, self._child.stdout
        if asked is None or answered is None:
            raise ValueError("the child was started without pipes")
        asked.write(_LENGTH.pack(len(data)) + data)
        asked.flush()
        ready, _, _ = select.select([answered], [], [], self._timeout_s)
        if not ready:
            raise TimeoutError
        found: dict[str, str] = json.loads(answered.readline())
        return found

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:  # bytes it never read
                    continue


def _serve(asked: IO[bytes], answers: IO[bytes]) -> None:
    """Answer until the parent is gone."""
    from byline.catalog.decode import decode_image
    from byline.catalog.look import look_of

    while len(head := asked.read(_LENGTH.size)) == _LENGTH.size:
        data = asked.read(_LENGTH.unpack(head)[0])
        try:
            look = look_of(decode_image(data))
            answer = {"hash": str(look.hash), "thumbnail": look.thumbnail.hex()}
        except ImageTooLarge as error:
            answer = {"reason": error.reason, "message": error.message.partition(": ")[2]}
        except ImageUndecodable as error:
            answer = {"reason": error.reason, "message": error.message.partition(": ")[2]}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    _serve(sys.stdin.buffer, sys.stdout.buffer)
