"""The parent process of a worker: Celery's consumer, the one task, and the wire that tells the child to stop.

Why it exists: a forked child inherits what its parent imported, and torch or CUDA does not survive that. So the
parent holds only Celery, and everything that computes is imported by the child after the fork. It also
closes a gap: Celery tells its children nothing on a warm shutdown, and a verification would keep it waiting for
minutes; a byte through a pipe lets the child hand its job back at the next check.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

from celery import Celery, signals

from byline.config import Settings
from byline.queue import CANARY, TASK, TIME_LIMIT_S, make_celery, own_queue, send_canary
from byline.telemetry import get_logger
from services.workers.canary import Canary

if TYPE_CHECKING:
    from services.workers.child import WorkerChild

log = get_logger(__name__)

#: How long a child that could not start waits before it ends and another one is started.
_RESTART_PAUSE_S = 2.0
#: How long a parent is given to end as its child asks, before it is killed.
_END_S = 2.0
#: What the child says to its parent, a byte each: take doorbells, leave them to others, end.
_TAKE, _LEAVE, _END = b"+", b"-", b"x"


class WorkerProcess:
    """One worker on one queue: a parent that consumes, a child that computes (prefork, concurrency 1)."""

    def __init__(self, queue: str, settings: Settings, *, metrics_port: int = 0, name: str | None = None) -> None:
        self._queue = queue
        self._settings = settings
        self._metrics_port = metrics_port
        self._name = name or f"{queue}-{os.getpid()}"
        self._child: WorkerChild | None = None
        self._stop_read, self._stop_write = os.pipe()
        self._consume_read, self._consume_write = os.pipe()
        self._ending = False
        self._parent = os.getpid()
        self._own = own_queue(f"{self._name}@{socket.gethostname()}")
        self._canary: Canary | None = None
        self.app = self._celery()

    def run(self) -> int:
        """Consume until a signal ends it. Returns the exit code."""
        logging.captureWarnings(True)
        for doubled in ("celery.worker.strategy", "celery.app.trace"):  # the runner says how every stage ended
            logging.getLogger(doubled).setLevel(logging.WARNING)
        receivers = (
            (signals.setup_logging, self._keep_our_logging),
            (signals.worker_process_init, self._child_started),
            (signals.worker_process_shutdown, self._child_ends),
            (signals.worker_shutting_down, self._shutting_down),
        )
        for event, receiver in receivers:
            event.connect(receiver, weak=False)
        worker = self.app.Worker(
            hostname=f"{self._name}@{socket.gethostname()}",
            queues=[self._queue, self._own],
            pool="prefork",
            pool_start_method="fork",
            concurrency=1,
            time_limit=TIME_LIMIT_S[self._queue],
            without_gossip=True,
            without_mingle=True,
            quiet=True,
        )
        threading.Thread(target=self._watch_child, args=(worker,), name="consume-watch", daemon=True).start()
        log.info("worker_starting", queue=self._queue, worker=self._name, pid=os.getpid())
        worker.start()
        log.info("worker_stopped", queue=self._queue, worker=self._name, exitcode=worker.exitcode or 0)
        return int(worker.exitcode or 0)

    def _celery(self) -> Celery:
        app = make_celery(self._settings.redis_url, own=self._own)

        def run_stage(job_id: str, stage: str) -> None:
            if self._child is None:
                raise RuntimeError("a stage was delivered before this child had started")
            with nullcontext() if self._canary is None else self._canary.working():
                self._child.handle(job_id, stage)

        def canary() -> None:
            if self._canary is not None:
                self._canary.came_back()

        app.task(name=TASK)(run_stage)
        app.task(name=CANARY)(canary)
        return app

    # -- receivers: Celery passes more keywords than are used -----------------------------------

    def _keep_our_logging(self, **_: Any) -> None:
        """Being connected is the point: Celery then leaves the configured logging alone."""

    def _child_started(self, **_: Any) -> None:
        os.close(self._stop_write)
        os.close(self._consume_read)
        stopping = threading.Event()
        threading.Thread(target=self._watch_parent, args=(stopping,), name="stop-watch", daemon=True).start()
        try:
            self._child = self._started_child(stopping)
            self._watch_consumption(stopping)
        except Exception:
            # Celery would swallow it and keep a child that can do nothing; one that ends is replaced.
            log.exception("child_not_started", queue=self._queue, worker=self._name)
            stopping.wait(_RESTART_PAUSE_S)
            os._exit(1)

    def _started_child(self, stopping: threading.Event) -> WorkerChild:
        from services.workers.child import WorkerChild

        worker_id = f"{self._name}@{socket.gethostname()}:{os.getpid()}"
        child = WorkerChild(self._queue, self._settings, worker_id, stopping, metrics_port=self._metrics_port,
                            consume=lambda consuming: self._tell_parent(consuming))  # fmt: skip
        child.start()
        return child

    def _watch_consumption(self, stopping: threading.Event) -> None:
        """In the child: end this worker, parent and all, when it consumes nothing any more."""
        if not self._settings.canary_seconds:
            return
        app, redis_url = make_celery(self._settings.redis_url, own=self._own), self._settings.redis_url

        def deaf() -> None:
            stopping.set()  # what the pump holds goes back
            if self._child is not None:
                self._child.close()
            self._end_parent()
            os._exit(1)

        self._canary = Canary(
            lambda: send_canary(app, redis_url, self._own), deaf, time.monotonic, self._settings.canary_seconds
        )
        threading.Thread(target=self._canary.run, args=(stopping,), name="canary", daemon=True).start()

    def _end_parent(self) -> None:
        """In the child: the parent's own thread ends it on our word, and SIGKILL a parent that hangs altogether.

        The word comes first because a container's first process cannot be killed from within.
        """
        with suppress(OSError):
            os.set_blocking(self._consume_write, False)  # full: nobody reads it
            os.write(self._consume_write, _END)
        until = time.monotonic() + _END_S
        while os.getppid() == self._parent and time.monotonic() < until:
            time.sleep(0.05)
        if os.getppid() == self._parent:
            os.kill(self._parent, signal.SIGKILL)

    def _watch_parent(self, stopping: threading.Event) -> None:
        os.read(self._stop_read, 1)  # a byte: stop asked; end of file: the parent is gone
        stopping.set()

    def _tell_parent(self, consuming: bool) -> None:
        os.write(self._consume_write, _TAKE if consuming else _LEAVE)

    def _watch_child(self, worker: Any) -> None:
        """In the parent: take doorbells, leave them to other workers, or end, as the child says."""
        while said := os.read(self._consume_read, 1):
            if said == _END:
                os._exit(1)  # in good order it would wait for the very loop that consumes nothing
            consumer, wanted = worker.consumer, said == _TAKE
            tasks = None if consumer is None else consumer.task_consumer
            if self._ending or tasks is None or tasks.consuming_from(self._queue) is wanted:
                continue  # as it should be, or not connected: the child says it again at its next look
            change = consumer.add_task_queue if wanted else consumer.cancel_task_queue
            consumer.call_soon(change, self._queue)  # on Celery's own thread
            log.info("doorbells_taken" if wanted else "doorbells_left_to_others", worker=self._name)

    def _child_ends(self, **_: Any) -> None:
        if self._child is not None:
            self._child.close()

    def _shutting_down(self, **_: Any) -> None:
        self._ending = True
        os.write(self._stop_write, b"\0")
