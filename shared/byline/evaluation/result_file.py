"""The JSON every long command leaves behind: what was run, where, on which commit, and its figures.

Why it exists: figures without the command, the machine and the commit cannot be compared, and two programs writing
their own headers would soon disagree.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def git_commit(directory: Path) -> str:
    """The commit checked out in ``directory``, or "" outside of a repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=directory, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def machine() -> dict[str, object]:
    """CPU model, usable cores, GPU name (or None) and torch version (or None)."""
    gpu: str | None = None
    version: str | None = None
    try:
        import torch
    except ImportError:
        pass  # figures of programs that run without torch
    else:
        version = str(torch.__version__)
        gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"cpu": _cpu_model(), "cores": len(os.sched_getaffinity(0)), "gpu": gpu, "torch": version}


def write_result(path: Path, figures: Mapping[str, Any], *, command: str, seconds: float, commit: str,
                 seed: int | None) -> None:
    """Write ``figures`` with their header; the folder is made if need be, a broken write leaves the old file."""
    document = {"command": command, "seconds": round(seconds, 3), "machine": machine(), "commit": commit, "seed": seed,
                **figures}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
