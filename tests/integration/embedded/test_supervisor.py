"""The supervisor: restarts what dies, and loses nothing when it is killed itself."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psycopg
import pytest

from byline.config import Settings, load_settings
from byline.embedded.control import bring_down, bring_up
from byline.embedded.discovery import discover
from byline.embedded.process import ProcessIdentity
from byline.embedded.services import Service
from byline.embedded.status import ProcessStatus, read_status
from byline.embedded.supervisor import Supervisor
from byline.errors import ServerNotStarted

T = TypeVar("T")
#: Stands for a service: it runs until it is told to stop.
STEADY = Service("steady", ("http.server", "0", "--bind", "127.0.0.1"))
#: Stands for a service that cannot start.
BROKEN = Service("broken", ("json.tool", "/there-is-no-such-file"))


def eventually(read: Callable[[], T | None], deadline_s: float = 60.0) -> T:
    """The first non-None answer of ``read``; fails after ``deadline_s``."""
    pause = threading.Event()
    end = time.monotonic() + deadline_s
    while (value := read()) is None:
        assert time.monotonic() < end, "it did not happen in time"
        pause.wait(0.05)
    return value


@pytest.fixture
def state_dir(server_directory: Path, request: pytest.FixtureRequest) -> Path:
    return server_directory / request.node.name


@pytest.fixture
def on_shared_servers(state_dir: Path, database_url: str, redis_url: str) -> Settings:
    return load_settings(
        state_dir=state_dir, database_url=database_url, redis_url=redis_url, grpc_address="127.0.0.1:0", drain_seconds=2
    )


def _line(state_dir: Path, name: str) -> ProcessStatus | None:
    return next((line for line in read_status(state_dir) if line.name == name), None)


def _restarted(state_dir: Path, name: str, old_pid: int) -> ProcessStatus | None:
    line = _line(state_dir, name)
    return line if line and line.state == "running" and line.pid != old_pid else None


@pytest.fixture
def supervised(on_shared_servers: Settings) -> Iterator[Path]:
    stop = threading.Event()
    supervisor = Supervisor(on_shared_servers, [STEADY, BROKEN])
    thread = threading.Thread(target=supervisor.run, args=(stop.wait,))
    thread.start()
    yield on_shared_servers.state_dir
    stop.set()
    thread.join(60)
    assert not thread.is_alive()


def test_a_killed_service_is_started_again_and_a_broken_one_hinders_nobody(supervised: Path) -> None:
    first = eventually(lambda: _line(supervised, "steady"))
    os.kill(first.pid, signal.SIGKILL)
    again = eventually(lambda: _restarted(supervised, "steady", first.pid))
    assert again.last_exit == -signal.SIGKILL
    assert again.crashes == 1
    broken = eventually(lambda: (line := _line(supervised, "broken")) and line.crashes >= 2 and line or None)
    assert broken.last_exit not in (0, None)
    assert "No such file" in Path(broken.log).read_text()


def test_two_supervisors_never_share_a_state_directory(supervised: Path, on_shared_servers: Settings) -> None:
    eventually(lambda: discover(supervised))
    with pytest.raises(ServerNotStarted, match="another supervisor"):
        Supervisor(on_shared_servers, []).run(lambda seconds: True)
    assert discover(supervised) is not None


def test_after_a_stop_no_process_is_left(on_shared_servers: Settings) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=Supervisor(on_shared_servers, [STEADY]).run, args=(stop.wait,))
    thread.start()
    line = eventually(lambda: _line(on_shared_servers.state_dir, "steady"))
    stop.set()
    thread.join(60)
    assert not line.identity().alive()
    assert discover(on_shared_servers.state_dir) is None
    assert read_status(on_shared_servers.state_dir) == []


def test_a_service_that_never_comes_up_is_reported_with_its_log_and_nothing_is_left(
    state_dir: Path, database_url: str, redis_url: str
) -> None:
    settings = load_settings(
        state_dir=state_dir, database_url=database_url, redis_url=redis_url, grpc_address="127.0.0.1:0",
        device="no-such-device", model_directory="/there/is/no/model", drain_seconds=1,
    )
    state_dir.mkdir()
    (state_dir / "logs").write_text("a file where the folder of logs should be")
    with pytest.raises((ServerNotStarted, OSError)):
        bring_up(settings, ["gateway"], timeout_s=60)
    assert discover(state_dir) is None


def test_rows_survive_kill_9_of_the_supervisor_and_of_its_servers(state_dir: Path) -> None:
    settings = load_settings(state_dir=state_dir, grpc_address="127.0.0.1:0")
    first = bring_up(settings, ())
    with psycopg.connect(first.database_url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS n")
    left = [line.identity() for line in read_status(state_dir)]
    assert len(left) == 2

    os.kill(left[0].pid, signal.SIGKILL)
    eventually(lambda: _restarted(state_dir, "postgres", left[0].pid))

    supervisor = ProcessIdentity(first.supervisor_pid, first.supervisor_created)
    os.kill(supervisor.pid, signal.SIGKILL)
    eventually(lambda: None if supervisor.alive() else True)
    assert discover(state_dir) is None

    second = bring_up(settings, ())
    assert second.supervisor_pid != first.supervisor_pid
    assert not any(identity.alive() for identity in left)
    with psycopg.connect(second.database_url.replace("+psycopg", "")) as connection:
        assert connection.execute("SELECT n FROM kept").fetchone() == (42,)
    running = [line.identity() for line in read_status(state_dir)]
    assert bring_down(settings)
    assert not any(identity.alive() for identity in running)
    assert not bring_down(settings)
