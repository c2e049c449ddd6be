"""Logs are JSON lines that carry what was bound; signals end a wait; progress is visible without a terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import structlog

from byline.config import load_settings
from byline.telemetry import bind, configure_logging, get_logger, install_signal_handlers, progress


@pytest.fixture
def json_logs() -> Iterator[None]:
    import logging

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    configure_logging("test", load_settings(log_format="json"))
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_line_names_the_service_and_the_job_it_belongs_to(
    json_logs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("test", load_settings(log_format="json"))
    with bind(job_id="j1", fence=3):
        get_logger("here").info("stage_completed", seconds=0.5)
    get_logger("here").warning("outside")
    inside, outside = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert inside["service"] == "test"
    assert (inside["job_id"], inside["fence"], inside["event"], inside["seconds"]) == ("j1", 3, "stage_completed", 0.5)
    assert "job_id" not in outside
    assert outside["level"] == "warning"


def test_progress_yields_everything_and_says_how_far_it_is(
    json_logs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("test", load_settings(log_format="json"))
    assert list(progress(range(3), 3, "items", every_s=0.0)) == [0, 1, 2]
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["done"] for line in lines] == [1, 2, 3, 3]


def test_sigterm_ends_a_wait_and_a_second_one_ends_the_process() -> None:
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        install_signal_handlers(stop)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(30)
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(30)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_importing_telemetry_configures_nothing() -> None:
    code = "import logging, byline.telemetry; print(logging.getLogger().handlers)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
