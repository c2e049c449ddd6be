"""What the supervisor says about its processes: written by it, read by ``byline status`` and by its successor.

Why it exists: after ``kill -9`` of the supervisor the next one must find what was left running, and a
person wants to see what runs. One small file under the state directory serves both.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from byline.embedded.process import ProcessIdentity

STATUS_FILE = "processes.json"


@dataclass(frozen=True, kw_only=True)
class ProcessStatus:
    """One process of the system. ``state``: running, waiting (for its next start) or stopped."""

    name: str
    state: str
    pid: int
    created: float
    crashes: int
    crashes_in_a_row: int
    last_exit: int | None
    stop_signal: int
    log: str

    def identity(self) -> ProcessIdentity:
        """The process this line is about, which may be gone."""
        return ProcessIdentity(self.pid, self.created)

    def signal(self) -> signal.Signals:
        """What makes it stop cleanly."""
        return signal.Signals(self.stop_signal)


def write_status(state_dir: Path, processes: Sequence[ProcessStatus]) -> None:
    """Replace the status file in one atomic step."""
    path = state_dir / STATUS_FILE
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps([asdict(process) for process in processes], indent=1))
    temporary.replace(path)


def read_status(state_dir: Path) -> list[ProcessStatus]:
    """The last status written; empty when there is none or it is of another version."""
    try:
        return [ProcessStatus(**entry) for entry in json.loads((state_dir / STATUS_FILE).read_text())]
    except FileNotFoundError:
        return []
    except (json.JSONDecodeError, TypeError):
        return []
