"""Rows of a long evaluation by key, one JSON line each, written as soon as they are there.

Why it exists: a killed comparison of teachers must go on where it was, and never take a row made under other
conditions for its own: whatever a row depends on is in its key.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class KeptRows:
    """The rows of one file. A line torn by a kill is not read, and its row is made again."""

    def __init__(self, path: Path) -> None:
        """Read what is there; the file need not exist."""
        self._path = path
        self._rows: dict[str, dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                document = json.loads(line)
                self._rows[document["key"]] = document["row"]
            except (ValueError, KeyError, TypeError):
                continue

    def get(self, key: str) -> dict[str, Any] | None:
        """The row kept under ``key``."""
        return self._rows.get(key)

    def put(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row; durable when it returns."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            # Begins with a line break, in case a kill left half a line.
            file.write("\n" + json.dumps({"key": key, "row": row}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._rows[key] = row
