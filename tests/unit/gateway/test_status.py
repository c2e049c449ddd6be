"""Errors to statuses: what a client may see of them."""

from __future__ import annotations

from google.rpc import code_pb2, error_details_pb2
from sqlalchemy.exc import OperationalError

from byline.errors import DatabaseUnavailable, ImageTooLarge, JobNotFound
from services.gateway import status


def details(made: object) -> dict[str, object]:
    found: dict[str, object] = {}
    for detail in made.details:  # type: ignore[attr-defined]
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            message = kind()
            if detail.Unpack(message):
                found[kind.__name__] = message
    return found


def test_a_wrong_field_is_named_as_a_violation() -> None:
    found = details(status.from_error(ImageTooLarge("query.inline_image", "too large", limit=3)))
    violation = found["BadRequest"].field_violations[0]  # type: ignore[attr-defined]
    assert (violation.field, violation.reason) == ("query.inline_image", "IMAGE_TOO_LARGE")
    assert dict(found["ErrorInfo"].metadata)["limit"] == "3"  # type: ignore[attr-defined]
    assert "RetryInfo" not in found


def test_a_stored_error_reads_like_the_one_that_was_raised() -> None:
    error = JobNotFound("no such job", job="1")
    assert status.from_stored(error.to_json()) == status.from_error(error)


def test_a_drivers_error_becomes_database_unavailable_without_its_text() -> None:
    known = status.typed(OperationalError("SELECT secret", {}, Exception("password")))
    assert isinstance(known, DatabaseUnavailable) and "secret" not in known.message


def test_a_bug_shows_an_id_and_nothing_else() -> None:
    assert status.typed(KeyError("/etc/passwd")) is None
    made = status.internal("abc")
    assert made.code == code_pb2.INTERNAL and "abc" in made.message


def test_long_texts_are_cut_to_fit_the_headers() -> None:
    made = status.from_error(JobNotFound("x" * 50_000, job="y" * 50_000))
    assert made.ByteSize() < 8_000
