"""What ends in a process is exported under the ids its job carries, with waiting beside working."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from byline import tracing
from byline.config import Settings, load_settings
from byline.errors import SettingsInvalid
from byline.span_export import start_span_export
from byline.tracing import Finished, Trace

TRACE = Trace("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", "00f067aa0ba902b7")
NOW_NS = 1_800_000_000_000_000_000


def exported(*finished: Finished) -> list[ReadableSpan]:
    memory = InMemorySpanExporter()
    stop = start_span_export("lookup", Settings(), exporter=memory, clock_ns=lambda: NOW_NS)
    for one in finished:
        tracing.finish(one)
    stop()
    tracing.finish(Finished(TRACE, "after the end", 1.0))
    return list(memory.get_finished_spans())


def test_a_span_keeps_its_ids_its_parent_and_its_time() -> None:
    (span,) = exported(Finished(TRACE, "lookup", 0.25, attributes={"byline.job_id": "j"}))
    assert span.context is not None and span.parent is not None
    assert format(span.context.trace_id, "032x") == format(span.parent.trace_id, "032x") == TRACE.trace_id
    ids = format(span.context.span_id, "016x"), format(span.parent.span_id, "016x")
    assert ids == (TRACE.span_id, TRACE.parent_id)
    assert (span.start_time, span.end_time) == (NOW_NS - 250_000_000, NOW_NS)
    assert span.resource.attributes["service.name"] == "byline-lookup" and span.attributes == {"byline.job_id": "j"}
    assert span.status.status_code is StatusCode.UNSET and span.kind is SpanKind.CONSUMER


def test_waiting_is_a_sibling_that_ends_where_working_begins() -> None:
    working, waiting = exported(Finished(TRACE, "verify", 1.0, waited_s=2.0, error="failed"))
    assert waiting.name == "wait verify" and waiting.parent == working.parent
    assert waiting.context is not None and working.context is not None
    assert waiting.context.span_id != working.context.span_id
    assert (waiting.start_time, waiting.end_time) == (NOW_NS - 3_000_000_000, working.start_time)
    assert working.status.status_code is StatusCode.ERROR and working.status.description == "failed"
    assert waiting.status.status_code is StatusCode.UNSET


def test_what_the_caller_does_not_sample_is_not_exported() -> None:
    assert exported(Finished(Trace(TRACE.trace_id, TRACE.span_id, sampled=False), "lookup", 1.0)) == []


def test_of_new_traces_a_share_is_sampled_and_a_callers_decision_stands() -> None:
    sampled = sum(tracing.span(None, share=0.25).sampled for _ in range(4000))
    assert 850 < sampled < 1150  # 5.5 standard deviations
    assert tracing.span(f"00-{TRACE.trace_id}-{TRACE.span_id}-01", share=0.0).sampled
    assert tracing.span(None, share=1.0).sampled and not tracing.span(None, share=0.0).sampled


def test_an_endpoint_is_an_http_address() -> None:
    with pytest.raises(SettingsInvalid, match="BYLINE_OTLP_ENDPOINT"):
        load_settings(otlp_endpoint="collector:4317")


def test_stopping_sends_what_is_left_to_the_collector(collector: Any) -> None:
    stop = start_span_export("gateway", load_settings(otlp_endpoint=collector.address))
    tracing.finish(Finished(TRACE, "attribution.v1.AttributionService/Attribute", 0.01, serves=True))
    stop()
    ((service, span),) = collector.spans(TRACE.trace_id)
    assert service == "byline-gateway"
    assert (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()) == (
        TRACE.trace_id, TRACE.span_id, TRACE.parent_id,
    )  # fmt: skip


def test_a_collector_that_is_away_costs_spans_and_nothing_else() -> None:
    stop = start_span_export("gateway", load_settings(otlp_endpoint="http://127.0.0.1:9"))
    tracing.finish(Finished(TRACE, "lookup", 0.01))
    stop()
