"""``python -m byline.embedded``: the supervisor in the foreground (what ``byline up`` starts in the background)."""

from __future__ import annotations

import argparse
import sys
import threading

from byline.config import load_settings
from byline.embedded.services import NAMES, chosen
from byline.embedded.supervisor import Supervisor
from byline.errors import BylineError
from byline.telemetry import configure_logging, install_signal_handlers


def main() -> int:
    """Run until SIGTERM or SIGINT; the exit code says whether the system came up."""
    parser = argparse.ArgumentParser(prog="python -m byline.embedded", description=__doc__)
    parser.add_argument("--services", default=",".join(NAMES), help="comma-separated names; default: %(default)s")
    arguments = parser.parse_args()
    stop = threading.Event()
    install_signal_handlers(stop)
    try:
        settings = load_settings()
        configure_logging("supervisor", settings)
        Supervisor(settings, chosen(filter(None, arguments.services.split(",")))).run(stop.wait)
    except BylineError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
