"""One request's path through the system, by the W3C ``traceparent`` header.

Why it exists: a job is asked for in one process, runs in others and may be run again after a crash, so what ties its
log lines together must outlive all of them. The gateway takes the caller's ``traceparent`` (or begins a trace) and
writes it on the job's row; whoever claims the job goes on from there. The row, not the message, carries it: a doorbell
that Redis lost is rung again by somebody who never saw the request. Every line logged within :func:`within` names
``trace_id``, ``span_id`` and ``parent_span_id``. What ends is told to :func:`finish`; a process that exports spans
(``byline.span_export``) listens there, and in any other it costs nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

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


@dataclass(frozen=True, slots=True)
class Finished:
    """A span that just ended: how long it took, how long what it did had waited before, and what went wrong, if
    anything did. ``attributes`` never hold a prompt or an image."""

    trace: Trace
    name: str
    seconds: float
    waited_s: float = 0.0
    serves: bool = False
    error: str = ""
    attributes: Mapping[str, str | int | float] = field(default_factory=dict)


Sink = Callable[[Finished], None]
_current: ContextVar[Trace | None] = ContextVar("byline_trace", default=None)
_sinks: list[Sink] = []


def current() -> Trace | None:
    """The span the caller runs in, if any."""
    return _current.get()


def parse(header: str | None) -> Trace | None:
    """The caller's span of a ``traceparent``; None for what is absent or malformed, as W3C asks: begin a new trace."""
    found = _FORM.fullmatch((header or "").strip())
    if found is None or set(found["trace"]) == {"0"} or set(found["span"]) == {"0"}:
        return None
    return Trace(found["trace"], found["span"], sampled=bool(int(found["flags"], 16) & 1))


def span(header: str | None, random: Callable[[int], bytes] = os.urandom, share: float = 1.0) -> Trace:
    """A new span: a child of ``header``'s, or the root of a new trace. ``random(n)`` gives n bytes.

    Of new traces ``share`` is sampled, decided by the trace's id; a caller's decision stands.
    """
    parent = parse(header)
    if parent is None:
        trace_id = random(16)
        return Trace(trace_id.hex(), random(8).hex(), sampled=int.from_bytes(trace_id[8:], "big") < share * 2**64)
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


def export_to(sink: Sink) -> Callable[[], None]:
    """Tell ``sink`` of every sampled span that ends in this process, until the returned function is called."""
    _sinks.append(sink)
    return lambda: _sinks.remove(sink)


def told() -> Trace | None:
    """The span the caller runs in, if anybody is to be told of its end: what is told need not be put together else."""
    found = _current.get()
    return found if _sinks and found is not None and found.sampled else None


def finish(finished: Finished) -> None:
    """Say that a span ended."""
    if finished.trace.sampled:
        for sink in _sinks:
            sink(finished)
