"""Send finished spans to an OpenTelemetry collector (OTLP over HTTP), where ``BYLINE_OTLP_ENDPOINT`` names one.

Why it exists: our spans are begun in one process and go on in others, after crashes too, from what a job's row says;
the SDK's tracer would make ids of its own. So ids are ours (``byline.tracing``), and everything behind an ended span
(queue, batching, encoding, retries) is the SDK's. HTTP, because a gRPC channel does not survive the fork of a worker.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from byline import tracing
from byline.config import Settings
from byline.tracing import Finished, Trace

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import SpanContext

#: A collector that is away costs a thread so long, and no span is worth a slow stop.
TIMEOUT_S = 5.0


def start_span_export(
    service: str,
    settings: Settings,
    *,
    exporter: SpanExporter | None = None,
    clock_ns: Callable[[], int] = time.time_ns,
) -> Callable[[], None]:
    """Export this process's spans from now on; the returned function sends what is left and ends it.

    Does nothing without ``settings.otlp_endpoint`` (or an ``exporter``). Call it in the process that does the work: the
    sending thread does not survive a fork. A collector that cannot be reached costs spans and nothing else.
    """
    if not settings.otlp_endpoint and exporter is None:
        return lambda: None
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanKind, Status, StatusCode

    if exporter is None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(f"{settings.otlp_endpoint.rstrip('/')}/v1/traces", timeout=TIMEOUT_S)
    resource = Resource.create({"service.name": f"byline-{service}", "service.namespace": "byline"})
    scope = InstrumentationScope("byline")
    processor = BatchSpanProcessor(exporter)

    def send(
        trace: Trace, name: str, start_ns: int, end_ns: int, kind: SpanKind, status: Status, about: Finished
    ) -> None:
        parent = _context(trace.trace_id, trace.parent_id, remote=True) if trace.parent_id else None
        processor.on_end(
            ReadableSpan(
                name, _context(trace.trace_id, trace.span_id), parent, resource, dict(about.attributes), kind=kind,
                status=status, start_time=start_ns, end_time=end_ns, instrumentation_scope=scope,
            )
        )  # fmt: skip

    def sink(finished: Finished) -> None:
        end_ns = clock_ns()
        start_ns = end_ns - round(finished.seconds * 1e9)
        status = Status(StatusCode.ERROR, finished.error) if finished.error else Status()
        kind = SpanKind.SERVER if finished.serves else SpanKind.CONSUMER
        send(finished.trace, finished.name, start_ns, end_ns, kind, status, finished)
        if finished.waited_s > 0:  # a sibling: waiting is seen beside working
            waited = replace(finished.trace, span_id=os.urandom(8).hex())
            queued_ns = start_ns - round(finished.waited_s * 1e9)
            send(waited, f"wait {finished.name}", queued_ns, start_ns, SpanKind.INTERNAL, Status(), finished)

    forget = tracing.export_to(sink)

    def stop() -> None:
        forget()
        processor.shutdown()  # type: ignore[no-untyped-call]

    return stop


def _context(trace_id: str, span_id: str, *, remote: bool = False) -> SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags

    flags = TraceFlags(TraceFlags.SAMPLED)
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=remote, trace_flags=flags)
