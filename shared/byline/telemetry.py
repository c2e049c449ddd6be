"""Logs, metrics, progress and signals: one way of each for every program.

Why it exists: an operator reads one log format and one set of metric names. Log lines carry
``service`` and, through :func:`bind`, the job, stage, attempt, fence and release they belong to.
Prompts and image bytes are never logged, only their hashes; ids never become metric labels.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import structlog
from prometheus_client import Counter, Gauge, Histogram, start_http_server

from byline.config import Settings

T = TypeVar("T")

_FAST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_STAGE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)

#: Jobs' stages that ended here, by outcome (succeeded, failed, retried, cancelled, lease_lost, duplicate).
JOBS_COMPLETED = Counter("byline_jobs_completed", "Stages of jobs that ended, by outcome", ["stage", "outcome"])
#: Seconds from claim to end of a stage, by how it ended: a failure is often much faster than an answer.
STAGE_SECONDS = Histogram(
    "byline_stage_seconds", "Working time of a stage, by outcome", ["stage", "outcome"], buckets=_STAGE_BUCKETS
)
#: Seconds from creation (or the end of the stage before) to claim.
WAIT_SECONDS = Histogram("byline_wait_seconds", "Waiting time of a stage", ["stage"], buckets=_STAGE_BUCKETS)
#: Of claims that take what waits, several jobs at once.
CLAIM_JOBS = Histogram("byline_claim_jobs", "Jobs that one claim took", ["stage"], buckets=(1, 2, 4, 6, 8, 12, 16))
WORKER_BUSY = Gauge("byline_worker_busy_ratio", "Share of the last minute that a worker spent in stages", ["queue"])
LEASES_EXPIRED = Counter("byline_leases_expired", "Leases that ran out and were taken back by the dispatcher")
STALE_FENCE = Counter("byline_stale_fence", "Writes refused because another worker holds the job now")
DUPLICATE_DELIVERIES = Counter("byline_duplicate_deliveries", "Doorbells for a stage that was taken or done already")
#: Seconds of the steps a stage times itself: decode, encode, search, gradient, teacher, ...
STEP_SECONDS = Histogram("byline_step_seconds", "Working time of a step", ["stage", "step"], buckets=_STAGE_BUCKETS)
RPC_IN_FLIGHT = Gauge("byline_rpc_in_flight", "Unary calls being answered")
#: Ended calls. Of a unary call the whole time, of a stream the time to its first message; its code is that of its end.
RPC_SECONDS = Histogram("byline_rpc_seconds", "Time to answer a call", ["method", "code"], buckets=_FAST_BUCKETS)
CANARIES_MISSED = Counter("byline_canaries_missed", "Messages to itself that an idle worker did not get back")
WATCH_STREAMS = Gauge("byline_watch_streams", "Open watch streams")
DISPATCHED = Counter("byline_dispatched", "Doorbells rung", ["stage"])
RELEASE_INFO = Gauge("byline_release_info", "1 for the release this process answers from", ["release_id"])
SWAP_SECONDS = Histogram("byline_release_swap_seconds", "Load, verify and warm a release", buckets=_STAGE_BUCKETS)
GPU_MEMORY = Gauge("byline_gpu_memory_bytes", "GPU memory of this process, by kind (allocated, reserved)", ["kind"])
CURATION_FULL = Gauge("byline_curation_full", "1 while nothing is asked since there are as many rankings as allowed",
                      ["model"])  # fmt: skip
RANKINGS_ADDED = Counter("byline_rankings_added", "Rankings written", ["source"])
RELEASES_REJECTED = Counter("byline_releases_rejected", "Candidates the gate refused", ["reason"])


def configure_logging(service: str, settings: Settings) -> None:
    """Log to stderr: JSON lines, or readable ones on a terminal (``log_format`` decides). Standard-library
    loggers go the same way."""
    readable = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    renderer: list[structlog.types.Processor] = (
        [structlog.dev.ConsoleRenderer()]
        if readable
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level)
    for noisy in ("kombu", "amqp", "alembic", "urllib3", "PIL", "faiss"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
    structlog.contextvars.bind_contextvars(service=service)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger; pass facts as keywords: ``log.info("stage_completed", seconds=0.2)``."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def bind(**facts: object) -> AbstractContextManager[None]:
    """Add ``facts`` (job_id, stage, attempt, fence, release_id, …) to every line logged within the ``with`` block."""
    block: AbstractContextManager[None] = structlog.contextvars.bound_contextvars(**facts)
    return block


def start_metrics(port: int, host: str = "0.0.0.0") -> None:  # noqa: S104 - scraped from other machines
    """Serve /metrics on ``host:port``; port 0 means no metrics server. No line of it names a job or a person."""
    if port:
        start_http_server(port, addr=host)


def progress(iterable: Iterable[T], total: int | None, label: str, *, every_s: float = 10.0) -> Iterator[T]:
    """Yield from ``iterable`` showing how far it is: a bar on a terminal, else a log line every ``every_s`` seconds."""
    if sys.stderr.isatty():
        yield from _bar(iterable, total, label)
        return
    log = get_logger("byline.progress")
    started = last = time.monotonic()
    done = 0
    for value in iterable:
        yield value
        done += 1
        now = time.monotonic()
        if now - last >= every_s:
            last = now
            log.info("progress", label=label, done=done, total=total, seconds=round(now - started, 1))
    log.info("progress", label=label, done=done, total=total, seconds=round(time.monotonic() - started, 1))


def _bar(iterable: Iterable[T], total: int | None, label: str) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield from bar.track(iterable, total=total, description=label)


def install_signal_handlers(stop: threading.Event) -> None:
    """SIGTERM and SIGINT set ``stop``; a second one ends the process at once. Call it from the main thread."""
    asked = False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise SystemExit(128 + number)
        asked = True
        # Not here: the interrupted main thread may be inside stop.wait() and hold the event's lock.
        threading.Thread(target=stop.set, name="stop", daemon=True).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
