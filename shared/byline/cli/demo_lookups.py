"""Lookups that keep flowing in the background while a release is swapped, and what they saw.

Why it exists: "swapped in under their eyes" is a claim about answers given during the swap; this
asks for them at a steady pace and keeps the evidence: which release each named, and what failed.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from byline.client import Client
from byline.errors import BylineError


class SteadyLookups:
    """A thread that asks every ``interval_s`` seconds; a context manager that stops and joins it."""

    def __init__(
        self, address: str, model_id: str, queries: Sequence[tuple[bytes, str]], interval_s: float = 0.5
    ) -> None:
        self._client = Client(address, model=model_id, timeout=20)
        self._queries = queries
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._answers: list[tuple[float, str, bool]] = []
        self._errors: list[str] = []
        self._thread = threading.Thread(target=self._run, name="steady-lookups", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=60)
        self._client.close()

    def _run(self) -> None:
        for image, prompt in itertools.cycle(self._queries):
            if self._stop.is_set():
                return
            started = time.monotonic()
            try:
                found = self._client.attribute(image, prompt, top_k=10)
            except BylineError as error:
                with self._changed:
                    self._errors.append(f"{error.reason}: {error.message}")
            else:
                with self._changed:
                    # One answer, one release: what the job was pinned to and what the answer names.
                    mixed = found.job.release != found.answer.release
                    self._answers.append((time.monotonic() - started, found.release.rpartition("/")[2], mixed))
                    self._changed.notify_all()
            self._stop.wait(max(0.0, self._interval_s - (time.monotonic() - started)))

    def wait_for_release(self, release_id: str, count: int, timeout_s: float) -> bool:
        """Wait until ``count`` answers name this release; False if they did not in time."""
        with self._changed:
            return self._changed.wait_for(
                lambda: sum(named == release_id for _, named, _ in self._answers) >= count, timeout_s
            )

    def summary(self) -> dict[str, Any]:
        """How many lookups ran, failed and mixed releases; by release, and the slowest in milliseconds."""
        by_release: dict[str, int] = {}
        for _, release_id, _ in self._answers:
            by_release[release_id] = by_release.get(release_id, 0) + 1
        return {
            "lookups": len(self._answers) + len(self._errors),
            "failed": len(self._errors),
            "mixed": sum(mixed for _, _, mixed in self._answers),
            "by_release": by_release,
            "slowest_ms": 1e3 * max((seconds for seconds, _, _ in self._answers), default=0.0),
            "errors": self._errors[:5],
        }
