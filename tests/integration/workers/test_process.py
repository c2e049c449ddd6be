"""The parent and its child as real processes: a child that cannot start is replaced, and costs no doorbell; a worker
that consumes nothing ends, also where its parent cannot be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

from byline.config import load_settings
from byline.jobs import Stage
from byline.queue import enqueue, make_celery
from services.workers import process

#: A worker whose child module is replaced: its first two starts fail, the third one answers into a file.
PROGRAM = """
import sys, types
from pathlib import Path

from byline.config import load_settings
from services.workers import process

folder = Path(sys.argv[1])

class WorkerChild:
    def __init__(self, *_, **__):
        pass

    def start(self):
        starts = len(list(folder.glob("start-*")))
        (folder / f"start-{starts}").touch()
        if starts < 2:
            raise RuntimeError("a library is missing")

    def handle(self, job_id, stage):
        (folder / "answering").write_text(f"{job_id} {stage}")
        (folder / "answering").rename(folder / "answered")

    def close(self):
        pass

child = types.ModuleType("services.workers.child")
child.WorkerChild = WorkerChild
sys.modules["services.workers.child"] = child
process._RESTART_PAUSE_S = 0.1
sys.exit(process.WorkerProcess("lookup", load_settings()).run())
"""


#: A worker whose canaries are lost, in a place where its parent cannot be killed: as process 1 of a container.
DEAF = """
import os, signal, sys, types

from byline.config import load_settings
from services.workers import process

parent, kill = os.getpid(), os.kill

def kill_from_within(pid, number):
    if (pid, number) == (parent, signal.SIGKILL):
        print("not killed", flush=True)
    else:
        kill(pid, number)

class WorkerChild:
    def __init__(self, *_, **__):
        pass

    def start(self):
        pass

    def close(self):
        print("given back", flush=True)

child = types.ModuleType("services.workers.child")
child.WorkerChild = WorkerChild
sys.modules["services.workers.child"] = child
process.send_canary = lambda *_: None
os.kill = kill_from_within
sys.exit(process.WorkerProcess("lookup", load_settings()).run())
"""


def environment_of(redis_url: str, state: Path, **more: str) -> dict[str, str]:
    root = Path(process.__file__).resolve().parents[2]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(root / part) for part in ("", "shared", "protos")),
        "BYLINE_REDIS_URL": redis_url,
        "BYLINE_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
        "BYLINE_STATE_DIR": str(state),
        **more,
    }


def test_a_deaf_worker_ends_where_its_parent_cannot_be_killed(redis_url: str, tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    environment = environment_of(redis_url, tmp_path, BYLINE_CANARY_SECONDS="0.4")
    with log.open("wb") as out:
        worker = subprocess.Popen([sys.executable, "-c", DEAF], env=environment, cwd=tmp_path, stdout=out, stderr=out)
    try:
        assert worker.wait(90) == 1, log.read_text()
    finally:
        worker.kill()
    assert "consumes_nothing" in log.read_text() and "given back" in log.read_text()
    assert "not killed" not in log.read_text(), "it ended at its child's word"


def test_a_child_that_cannot_start_is_replaced_until_one_can(redis_url: str, tmp_path: Path) -> None:
    environment = environment_of(redis_url, tmp_path)
    job_id = uuid.uuid4()
    answered, log = tmp_path / "answered", tmp_path / "worker.log"
    with log.open("wb") as out:
        worker = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path)], env=environment, cwd=tmp_path, stdout=out, stderr=out
        )
    try:
        app = make_celery(load_settings(redis_url=redis_url, database_url=environment["BYLINE_DATABASE_URL"]).redis_url)
        deadline, pause = time.monotonic() + 90, threading.Event()
        while not answered.exists() and time.monotonic() < deadline:
            assert worker.poll() is None, log.read_text()
            enqueue(app, job_id, Stage.LOOKUP)  # as the dispatcher does while nobody claims the job
            pause.wait(0.5)
        assert answered.exists() and answered.read_text() == f"{job_id} lookup", log.read_text()
        assert len(list(tmp_path.glob("start-*"))) == 3
        assert "a library is missing" in log.read_text()
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(30)
