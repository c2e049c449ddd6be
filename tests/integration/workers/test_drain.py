"""A drained worker leaves doorbells to others, says when it holds nothing, and works again when it is told to."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from sqlalchemy import Engine, text

from byline.db import make_engine
from byline.jobs import Stage
from byline.queue import enqueue, make_celery
from services.workers import process
from services.workers.drain import DrainWatch

#: A real parent whose child answers doorbells into files and looks for its drain in a real database.
PROGRAM = """
import sys, threading, types
from pathlib import Path

from byline.config import load_settings
from byline.db import make_engine
from services.workers import process
from services.workers.drain import DrainWatch

folder = Path(sys.argv[1])

class WorkerChild:
    def __init__(self, queue, settings, worker_id, stopping, *, metrics_port, consume):
        engine = make_engine(settings.database_url, 1)
        self._drain = DrainWatch(engine, "w1", stopping, idle=lambda: True, consume=consume, poll_s=0.1)

    def start(self):
        self._drain.start()

    def handle(self, job_id, stage):
        (folder / job_id).touch()

    def close(self):
        pass

child = types.ModuleType("services.workers.child")
child.WorkerChild = WorkerChild
sys.modules["services.workers.child"] = child
from byline.telemetry import configure_logging
configure_logging("worker", load_settings(log_format="json"))
sys.exit(process.WorkerProcess("lookup", load_settings()).run())
"""


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = make_engine(database_url, pool_size=2)
    yield engine
    engine.dispose()


def set_drained(engine: Engine, drained: bool) -> None:
    with engine.begin() as connection:
        statement = "INSERT INTO worker_drains (worker) VALUES ('w1')" if drained else "DELETE FROM worker_drains"
        connection.execute(text(statement))


def is_told(engine: Engine) -> bool:
    with engine.begin() as connection:
        return bool(connection.execute(text("SELECT drained_at IS NOT NULL FROM worker_drains")).scalar())


def eventually(true: Callable[[], bool], log: Path) -> None:
    deadline, pause = time.monotonic() + 90, threading.Event()
    while not true():
        assert time.monotonic() < deadline, log.read_text()
        pause.wait(0.05)


def test_a_watch_says_drained_only_once_nothing_is_held(engine: Engine) -> None:
    busy, said = True, []
    watch = DrainWatch(engine, "w1", threading.Event(), idle=lambda: not busy, consume=said.append)
    watch.look()
    assert not watch.draining and said == [True]
    set_drained(engine, True)
    for _ in range(4):
        watch.look()
    assert watch.draining and said[1:] == [False] * 4 and not is_told(engine)
    busy = False
    watch.look()
    assert not is_told(engine)  # one idle look may fall between two jobs
    watch.look()
    assert is_told(engine)
    set_drained(engine, False)
    watch.look()
    assert not watch.draining and said[-1] is True


def test_a_drained_worker_leaves_doorbells_to_others_until_it_is_resumed(
    engine: Engine, database_url: str, redis_url: str, tmp_path: Path
) -> None:
    root = Path(process.__file__).resolve().parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(root / part) for part in ("", "shared", "protos")),
        "BYLINE_REDIS_URL": redis_url, "BYLINE_DATABASE_URL": database_url, "BYLINE_STATE_DIR": str(tmp_path),
    }  # fmt: skip
    log = tmp_path / "worker.log"
    # No socket timeout: its default of 5 s would end a BRPOP that waits.
    app, client = make_celery(redis_url), redis.Redis.from_url(redis_url, socket_timeout=None)
    first, second, third = (uuid.uuid4() for _ in range(3))
    with log.open("wb") as out:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
        worker = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=out, stderr=out)
    try:
        enqueue(app, first, Stage.LOOKUP)
        eventually((tmp_path / str(first)).exists, log)

        set_drained(engine, True)
        eventually(lambda: is_told(engine) and "doorbells_left_to_others" in log.read_text(), log)
        enqueue(app, second, Stage.LOOKUP)
        popped = client.brpop(["byline:lookup"], timeout=60)  # this test is the other worker
        assert popped is not None, log.read_text()
        assert json.loads(base64.b64decode(json.loads(popped[1])["body"]))[0] == [str(second), "lookup"]
        assert not (tmp_path / str(second)).exists()

        set_drained(engine, False)
        enqueue(app, third, Stage.LOOKUP)
        eventually((tmp_path / str(third)).exists, log)
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(60)
        client.close()
