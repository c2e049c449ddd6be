"""``python -m services.curation``: reads the settings, connects, and curates until a signal ends it.

Why it exists: it is the composition root, the only place that knows which database, which generator
and which features curation uses.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence

from byline import telemetry
from byline.catalog.store import CatalogStore
from byline.config import Settings, load_settings
from byline.db import make_engine
from byline.errors import BylineError, SettingsInvalid
from services.curation.loop import Curator

log = telemetry.get_logger(__name__)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m services.curation",
        description="Keeps a target number of ranking jobs open, so that labels never stop coming: plans a prompt, "
        "generates its picture, chooses candidates, enqueues the ranking. Settings come from BYLINE_* variables "
        "(BYLINE_CURATION_*); SIGTERM stops it.",
    )
    parser.add_argument("--metrics-port", type=int, default=0, help="serve Prometheus metrics here (0: off)")
    return parser


def make_curator(settings: Settings, stop: threading.Event) -> Curator | None:
    """Connect and load; waits for a corpus to be ingested first. None if ``stop`` was set meanwhile."""
    engine = make_engine(settings.database_url, pool_size=2, application="byline-curation")
    catalog = CatalogStore(engine)
    while not catalog.items(settings.corpus_id):
        if stop.wait(settings.curation_poll_seconds):
            return None
    from services.curation.wiring import Wiring

    return Wiring(engine, settings, stop).curator()


def main(argv: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        settings = load_settings()
        telemetry.configure_logging("curation", settings)
        stop = threading.Event()
        telemetry.install_signal_handlers(stop)
        telemetry.start_metrics(arguments.metrics_port)
        curator = make_curator(settings, stop)
    except SettingsInvalid as error:
        print(error, file=sys.stderr)
        return 2
    except BylineError as error:
        log.error("curation_cannot_start", reason=error.reason, error=error.message)
        return 1
    if curator is not None:
        log.info("curation_started", target_open=settings.curation_target_open)
        curator.run(stop, settings.curation_poll_seconds)
    log.info("curation_stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
