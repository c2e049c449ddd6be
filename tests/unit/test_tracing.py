"""A trace is taken over as W3C writes it, and goes on from a row as it would from a header."""

from __future__ import annotations

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from byline import tracing
from byline.tracing import Trace, parse, span

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def fixed(count: int) -> bytes:
    return bytes(range(1, count + 1))


def test_a_span_under_a_caller_keeps_the_trace_and_names_its_parent() -> None:
    found = span(CALLER, fixed)
    assert found == Trace("0af7651916cd43dd8448eb211c80319c", "0102030405060708", "b7ad6b7169203331")
    assert parse(str(found)) == Trace(found.trace_id, found.span_id)
    assert not span(CALLER[:-2] + "00", fixed).sampled and str(span(CALLER[:-2] + "00", fixed)).endswith("-00")


@pytest.mark.parametrize(
    "header",
    [
        None, "", "00-abc-def-01", CALLER.upper(), "ff" + CALLER[2:], CALLER + "-x",
        "00-" + "0" * 32 + "-b7ad6b7169203331-01", "00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01",
    ],
)  # fmt: skip
def test_what_is_no_traceparent_begins_a_new_trace(header: str | None) -> None:
    found = span(header, fixed)
    assert found.trace_id == fixed(16).hex() and found.parent_id == "" and found.sampled


@given(st.text())
def test_no_header_breaks_a_call(header: str) -> None:
    found = span(header)
    assert len(found.trace_id) == 32 and parse(str(found)) is not None


def test_lines_name_the_span_within_it_and_not_after() -> None:
    assert tracing.current() is None
    with tracing.within(span(CALLER, fixed)) as trace:
        assert tracing.current() is trace
        bound = structlog.contextvars.get_contextvars()
        assert (bound["trace_id"], bound["span_id"], bound["parent_span_id"]) == (
            trace.trace_id, "0102030405060708", "b7ad6b7169203331",
        )  # fmt: skip
        with tracing.within(span(str(trace))) as inner:
            assert inner.trace_id == trace.trace_id and inner.parent_id == trace.span_id
        assert tracing.current() is trace
    assert tracing.current() is None and "trace_id" not in structlog.contextvars.get_contextvars()


def test_the_end_of_a_span_is_told_only_where_somebody_listens_and_its_trace_is_sampled() -> None:
    with tracing.within(span(CALLER, fixed)) as trace:
        assert tracing.told() is None
        stop = tracing.export_to(lambda _: None)
        assert tracing.told() is trace
        with tracing.within(span(CALLER[:-2] + "00", fixed)):
            assert tracing.told() is None
        stop()
        assert tracing.told() is None
