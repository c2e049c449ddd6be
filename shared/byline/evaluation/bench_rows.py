"""Finished steps of a long benchmark, kept one line each, so that a killed run goes on where it was.

Why it exists: half an hour of measurements must survive a reboot, and a figure must be redrawn without measuring again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = Mapping[str, npt.NDArray[Any]]
#: What a step leaves: rows for the result file, and arrays that later steps need.
Step = tuple[list[dict[str, Any]], Arrays]


class RowFile:
    """``rows.jsonl`` and one ``.npz`` a step, in a directory of one configuration."""

    def __init__(self, directory: Path) -> None:
        """Open, or begin. A torn last line is dropped: its step runs again."""
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "rows.jsonl"
        self._done: dict[str, list[dict[str, Any]]] = {}
        self._seconds: dict[str, float] = {}
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                self._done[entry["step"]] = entry["rows"]
                self._seconds[entry["step"]] = entry["seconds"]

    @property
    def seconds(self) -> float:
        """Wall seconds of all steps that are done, whichever process ran them."""
        return sum(self._seconds.values())

    def once(self, name: str, run: Callable[[], Step]) -> tuple[list[dict[str, Any]], dict[str, npt.NDArray[Any]]]:
        """Rows and arrays of the step ``name``: as they were kept, or by running it now."""
        arrays = self.directory / f"{name}.npz"
        if name not in self._done:
            started = time.monotonic()
            rows, made = run()
            self._seconds[name] = time.monotonic() - started
            partial = arrays.with_suffix(".partial")
            with partial.open("wb") as file:
                np.savez(file, **{name: np.asarray(array) for name, array in made.items()})  # type: ignore[arg-type]
            partial.replace(arrays)
            with self._path.open("a") as lines:
                # Begins with a line break, in case a kill left half a line.
                lines.write("\n" + json.dumps({"step": name, "seconds": self._seconds[name], "rows": rows}) + "\n")
                lines.flush()
                os.fsync(lines.fileno())
            self._done[name] = json.loads(json.dumps(rows))
        with np.load(arrays, allow_pickle=False) as loaded:
            return self._done[name], {key: loaded[key] for key in loaded.files}
