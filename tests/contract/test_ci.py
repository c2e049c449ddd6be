"""What CI says at the end: whether it failed, and which tests were not run for what reason."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REASON = "SKIPPED [1] tests/contract/test_alerts.py:9: promtool is not installed"
PASSED = "====== 3 passed, 1 skipped in 0.1s ======"


@pytest.mark.parametrize("tests_fail", [False, True])
def test_skipped_tests_are_named_with_their_reasons_in_the_summary(tmp_path: Path, tests_fail: bool) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    make = tmp_path / "bin" / "make"
    make.parent.mkdir()
    make.write_text(f"#!/bin/sh\n[ $1 = lint ] || printf '%s\\n' '{REASON}' '{PASSED}'\n"
                    f"[ $1 = lint ] || exit {int(tests_fail)}\n")  # fmt: skip
    make.chmod(0o755)
    done = subprocess.run(
        [tmp_path / ".ci" / "run"], env={**os.environ, "PATH": f"{make.parent}:{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    summary = done.stdout.partition("== summary")[2]
    assert REASON in summary and PASSED in summary
    assert (done.returncode != 0) is tests_fail and ("FAILED" in summary) is tests_fail
