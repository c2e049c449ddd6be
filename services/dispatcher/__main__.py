"""``python -m services.dispatcher``: reads the settings, connects, and runs the loop until a signal ends it.

Why it exists: it is the composition root, the only place that knows which Postgres, which Redis and which
clock the dispatcher uses. It never imports torch or faiss.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Sequence

from prometheus_client import REGISTRY

from byline import telemetry
from byline.config import load_settings
from byline.db import make_engine
from byline.db.listen import QUEUED, Listener
from byline.errors import BrokerUnavailable, SettingsInvalid
from byline.jobs.outbox import Doorbell
from byline.jobs.states import Stage
from byline.jobs.store import JobStore
from byline.queue import check_broker, enqueue, make_celery
from services.dispatcher.collector import SystemCollector
from services.dispatcher.dispatch import GRACE_S, IN_FLIGHT, Dispatch
from services.dispatcher.loop import Loop
from services.dispatcher.marker import RedisMarker

log = telemetry.get_logger(__name__)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m services.dispatcher",
        description="Hands queued jobs to workers, takes back jobs of workers that fell silent, ends jobs whose "
        "time is up. Any number may run. Settings come from BYLINE_* variables; SIGTERM stops it.",
    )
    parser.add_argument("--metrics-port", type=int, default=0, help="serve Prometheus metrics here (0: off)")
    for stage in Stage:
        parser.add_argument(
            f"--in-flight-{stage.value}",
            type=int,
            default=IN_FLIGHT[stage],
            metavar="N",
            help=f"unanswered doorbells of stage {stage.value}; about twice its workers (default %(default)s)",
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        settings = load_settings()
        telemetry.configure_logging("dispatcher", settings)
        database_url, redis_url = settings.database_url, settings.redis_url
        check_broker(redis_url)
    except SettingsInvalid as error:
        print(error, file=sys.stderr)
        return 2
    except BrokerUnavailable as error:
        log.warning("server_away", reason=error.reason, error=error.message)
    stop = threading.Event()
    telemetry.install_signal_handlers(stop)
    if arguments.metrics_port:
        folders = {"releases": settings.release_dir, "blobs": settings.blob_dir}
        scraped = make_engine(database_url, pool_size=1, application="byline-metrics")
        REGISTRY.register(SystemCollector(scraped, redis_url, folders))
    telemetry.start_metrics(arguments.metrics_port)
    app = make_celery(redis_url)
    store = JobStore(make_engine(database_url, pool_size=2, application="byline-dispatcher"), bounds={})
    marker = RedisMarker(redis_url)

    def ring(doorbell: Doorbell) -> None:
        enqueue(app, doorbell.job_id, doorbell.stage)

    in_flight = {stage: int(getattr(arguments, f"in_flight_{stage.value}")) for stage in Stage}
    loop = Loop(store, Dispatch(store, ring, marker.is_new, in_flight=in_flight), stop, time.monotonic)

    def queued(_channel: str, stage: str) -> None:
        if stage not in GRACE_S:  # a new lookup is not due yet; a poll finds it if no worker has taken it by then
            loop.wake.set()

    listener = Listener(database_url, [QUEUED], stop, queued, loop.wake.set)
    listener.start()
    log.info("dispatcher_started", in_flight={stage.value: bound for stage, bound in in_flight.items()})
    loop.run()
    listener.join(timeout=2.0)
    marker.close()
    log.info("dispatcher_stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
