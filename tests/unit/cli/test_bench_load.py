"""The arithmetic of ``make bench-load``: a rate counts only if every call was answered, in time."""

from __future__ import annotations

from byline.cli.bench_load import Called, row_of, sustained


def row(rate: float, p99_ms: float | None, **refused: int) -> dict[str, object]:
    return {"offered_per_s": rate, "p99_ms": p99_ms, "refused": refused}


def test_the_sustained_rate_is_the_last_before_the_first_that_fails() -> None:
    assert sustained([row(50, 20.0), row(25, 10.0), row(100, 80.0), row(200, 30.0)], 50.0) == 50
    assert sustained([row(25, 10.0), row(50, 10.0, QUEUE_FULL=1)], 50.0) == 25
    assert sustained([row(25, None)], 50.0) is None


def test_refusals_are_counted_apart_from_answers_and_whether_they_say_when_to_come_back() -> None:
    calls = [Called(10.0), Called(30.0), Called(1.0, "QUEUE_FULL", 2.0), Called(1.0, "CALL_TIMED_OUT")]
    found = row_of(20.0, 2.0, calls)
    assert found["answered"] == 2 and found["answered_per_s"] == 1.0 and found["p50_ms"] == 20.0
    assert found["refused"] == {"QUEUE_FULL": 1, "CALL_TIMED_OUT": 1} and found["refused_saying_when"] == 1
    assert row_of(20.0, 2.0, [])["p99_ms"] is None
