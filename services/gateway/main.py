"""The gateway's command line: settings, logs, schema, then serve until told to stop.

Why it exists: everything that reads the environment or ends the process stands here and nowhere else.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from byline.config import load_settings
from byline.db import migrate
from byline.errors import BylineError
from byline.span_export import start_span_export
from byline.telemetry import configure_logging, start_metrics
from services.gateway.context import build_context
from services.gateway.server import leave, serve

#: After the grace of running calls: so long may the threads behind them take to notice.
_CLOSE_S = 2.0

#: Seconds a thread may hold the interpreter when others wait. Sixteen threads wait for Postgres in turn with the event
#: loop; Python's own 5 ms made each of their turns a queue (docs/lookup.md).
SWITCH_S = 0.0005


def main(argv: Sequence[str] | None = None) -> None:
    """Run the gateway. Ends with status 2 and one readable message if it cannot start."""
    options = _parser().parse_args(argv)
    try:
        settings = load_settings(grpc_address=options.address)
        configure_logging("gateway", settings)
        migrate(settings.database_url)
        context = build_context(settings)
        start_metrics(options.metrics_port)
        sys.setswitchinterval(SWITCH_S)
        stop_export = start_span_export("gateway", settings)
        try:
            asyncio.run(
                serve(
                    context, settings.grpc_address, settings.database_url,
                    notice_s=options.notice_seconds, grace_s=settings.drain_seconds, reflect=not options.no_reflection,
                )
            )  # fmt: skip
        finally:
            closed = context.close(_CLOSE_S)
            stop_export()
    except BylineError as error:
        print(f"gateway: {error.message}", file=sys.stderr)
        raise SystemExit(2) from error
    if not closed:
        leave(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m services.gateway",
        description="The gRPC API of Byline. Settings come from BYLINE_* variables; options here win over them.",
    )
    parser.add_argument("--address", metavar="HOST:PORT", help="where to listen (BYLINE_GRPC_ADDRESS)")
    parser.add_argument("--metrics-port", type=int, default=0, metavar="PORT", help="serve /metrics there (0: off)")
    parser.add_argument("--no-reflection", action="store_true", help="do not describe the API to strangers")
    parser.add_argument(
        "--notice-seconds", type=float, default=0.0, metavar="S",
        help="after SIGTERM, how long to stay NOT_SERVING before calls are ended (load balancers need some)",
    )  # fmt: skip
    return parser
