"""``python -m services.workers lookup|verification``: one Celery worker with one child process.

Why it exists: it turns the command line into settings and hands over. It must stay free of torch and
faiss, because what the parent imports is what a forked child would inherit broken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from byline.config import load_settings
from byline.errors import SettingsInvalid
from byline.telemetry import configure_logging
from services.workers.process import WorkerProcess

QUEUE_HELP = {
    "lookup": "the fast queue: embed the query, search the index (tier RETRIEVED)",
    "verification": "the slow queue: the whole corpus by sketches (tier ESTIMATED), the exact teacher on the "
    "candidates (tier VERIFIED) and curation's ranking jobs",
}


def parser() -> argparse.ArgumentParser:
    """The command line of a worker."""
    parser = argparse.ArgumentParser(
        prog="python -m services.workers",
        description="A Byline worker. Settings come from BYLINE_* variables; SIGTERM stops it gracefully: "
        "a running stage goes back to its queue without costing an attempt.",
    )
    queues = parser.add_subparsers(dest="queue", required=True, metavar="QUEUE")
    for queue, text in QUEUE_HELP.items():
        command = queues.add_parser(queue, help=text, description=text)
        command.add_argument("--metrics-port", type=int, default=0, help="serve Prometheus metrics here (0: off)")
        command.add_argument("--name", default=None, help="this worker's name among its siblings on the same host")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the worker until SIGTERM; the exit code says whether it ended as asked."""
    arguments = parser().parse_args(argv)
    try:
        settings = load_settings()
    except SettingsInvalid as error:
        print(error, file=sys.stderr)
        return 2
    configure_logging(f"worker-{arguments.queue}", settings)
    return WorkerProcess(arguments.queue, settings, metrics_port=arguments.metrics_port, name=arguments.name).run()


if __name__ == "__main__":
    sys.exit(main())
