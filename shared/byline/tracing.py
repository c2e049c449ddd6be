"""One request's path through the system, by the W3C ``traceparent`` header.

Why it exists: a job is asked for in one process, runs in others and may be run again after a crash, so what ties its
log lines together must outlive all of them. The gateway takes the caller's ``traceparent`` (or begins a trace) and
writes it on the job's row; whoever claims the job goes on from there. The row, not the message, carries it: a doorbell
that Redis lost is rung again by somebody who never saw the request. Every line logged within :func:`within` names
``trace_id``, ``span_id`` and ``parent_span_id``, which is all that a log-to-trace pipeline needs. No package for it is
installed, and none is needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from byline.telemetry import bind

#: The metadata key and the header's name, as W3C writes it.
HEADER = "traceparent"
_FORM = re.compile(r"00-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class Trace:
    """Where we are in a trace: ids in lower-case hex, ``parent_id`` empty at the root."""

    trace_id: str
    span_id: str
    parent_id: str = ""
    sampled: bool = True

    def __str__(self) -> str:
        """The ``traceparent`` to hand on: whoever gets it becomes a child of this span."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"


_current: ContextVar[Trace | None] = ContextVar("byline_trace", default=None)


def current() -> Trace | None:
    """The span the caller runs in, if any."""
    return _current.get()


def parse(header: str | None) -> Trace | None:
    """The caller's span of a ``traceparent``; None for what is absent or malformed, as W3C asks: begin a new trace."""
    found = _FORM.fullmatch((header or "").strip())
    if found is None or set(found["trace"]) == {"0"} or set(found["span"]) == {"0"}:
        return None
    return Trace(found["trace"], found["span"], sampled=bool(int(found["flags"], 16) & 1))


def span(header: str | None, random: Callable[[int], bytes] = os.urandom) -> Trace:
    """A new span: a child of ``header``'s, or the root of a new trace. ``random(n)`` gives n bytes."""
    parent = parse(header)
    if parent is None:
        return Trace(random(16).hex(), random(8).hex())
    return Trace(parent.trace_id, random(8).hex(), parent.span_id, parent.sampled)


def facts(trace: Trace) -> dict[str, str]:
    """What a log line says of a span."""
    found = {"trace_id": trace.trace_id, "span_id": trace.span_id}
    return found | ({"parent_span_id": trace.parent_id} if trace.parent_id else {})


@contextmanager
def within(trace: Trace) -> Iterator[Trace]:
    """Make ``trace`` the current span, and name it on every line logged, until the block ends."""
    token = _current.set(trace)
    try:
        with bind(**facts(trace)):
            yield trace
    finally:
        _current.reset(token)
