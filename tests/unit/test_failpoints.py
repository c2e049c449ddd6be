"""Failpoints: silent unless named, refused when misspelt, and ``kill`` leaves no chance to clean up."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from byline.config import load_settings
from byline.errors import SettingsInvalid
from byline.failpoints import NAMES, VARIABLE, Action, FailpointReached, failpoint, parse

ROOT = Path(__file__).resolve().parents[2]
CALL = re.compile(r"""\bfailpoint\(\s*["']([^"']+)["']""")


def test_nothing_happens_unless_the_environment_names_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    failpoint("trainer.before_fit")
    monkeypatch.setenv(VARIABLE, "trainer.after_fit=raise")
    failpoint("trainer.before_fit")


def test_raise_and_sleep_act_where_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "trainer.before_fit=raise, trainer.after_fit=sleep:0.05")
    with pytest.raises(FailpointReached, match="before_fit"):
        failpoint("trainer.before_fit")
    begun = time.monotonic()
    failpoint("trainer.after_fit")
    assert time.monotonic() - begun >= 0.05


def test_an_action_with_a_count_acts_on_that_passage_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("byline.failpoints._passages", Counter())
    monkeypatch.setenv(VARIABLE, "trainer.before_fit=raise@2")
    failpoint("trainer.before_fit")
    with pytest.raises(FailpointReached):
        failpoint("trainer.before_fit")
    failpoint("trainer.before_fit")


def test_kill_ends_the_process_without_cleanup() -> None:
    program = "import atexit; from byline.failpoints import failpoint\n" \
              "atexit.register(print, 'cleaned')\ntry:\n  failpoint('trainer.before_fit')\nfinally:\n  print('finally')"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False,
                           env={**os.environ, VARIABLE: "trainer.before_fit=kill"})
    assert ended.returncode == -signal.SIGKILL
    assert ended.stdout == ""
    assert "failpoint trainer.before_fit: kill" in ended.stderr


def test_a_misspelt_failpoint_is_refused_when_a_program_reads_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "trainer.before_fitt=kill,trainer.before_fit=die")
    with pytest.raises(SettingsInvalid) as refused:
        load_settings()
    assert "before_fitt: no such failpoint" in refused.value.message
    assert "trainer.before_fit=die" in refused.value.message


def test_the_variable_is_no_unknown_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "trainer.before_fit=sleep:1@3")
    load_settings()
    assert parse(os.environ[VARIABLE]) == {"trainer.before_fit": Action("sleep", 1.0, 3)}


def test_a_call_with_an_unlisted_name_fails_even_unarmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(KeyError, match="not listed"):
        failpoint("trainer.typo")


def test_every_name_in_the_code_is_listed() -> None:
    sources = [*(ROOT / "shared" / "byline").rglob("*.py"), *(ROOT / "services").rglob("*.py")]
    called = {name for source in sources for name in CALL.findall(source.read_text())}
    assert called <= NAMES
