"""Typed errors to ``google.rpc.Status``, and nothing else.

Why it exists: a call that fails and a job that fails must read alike, so both are made here from the same
three things: canonical code, stable reason, message. Domain of every ErrorInfo: ``attribution.v1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from byline.errors import BylineError, CallTimedOut, DatabaseUnavailable

DOMAIN = "attribution.v1"
#: gRPC sends the status as HTTP/2 headers, 8 KiB in all (the message percent-encoded, and once more in the details):
#: long texts are cut, those that encode to more sooner.
_MAX_TEXT = 600


def from_error(error: BylineError) -> status_pb2.Status:
    """The status of a typed error: ErrorInfo always, and by its code BadRequest (the wrong field), ResourceInfo (what
    is not there), PreconditionFailure (what stands in the way), QuotaFailure (whose limit) and RetryInfo."""
    return _described(error.code, error.reason, error.message, error.metadata, error.retry_after_s)


def from_stored(error: Mapping[str, Any]) -> status_pb2.Status:
    """The status of an error stored with a job (``BylineError.to_json``)."""
    code, reason = str(error.get("code") or "INTERNAL"), str(error.get("reason") or "INTERNAL")
    return _described(code, reason, str(error.get("message") or ""), error.get("metadata") or {}, None)


def internal(error_id: str) -> status_pb2.Status:
    """The status of a bug: nothing of it but an id that stands in the log."""
    info = _error_info("INTERNAL", {"error_id": error_id})
    return _status("INTERNAL", f"internal error {error_id}; the server's log says more", [info])


def typed(error: Exception) -> BylineError | None:
    """The typed error behind an exception; None means a bug."""
    if isinstance(error, BylineError):
        return error
    if isinstance(error, (OperationalError, InterfaceError, PoolTimeout)):
        return DatabaseUnavailable("the database cannot be reached; try again", cause=type(error).__name__)
    if isinstance(error, TimeoutError):
        return CallTimedOut("the call took longer than its deadline or than one call may take")
    return None


def _described(
    code: str, reason: str, message: str, metadata: Mapping[str, Any], retry_after_s: float | None
) -> status_pb2.Status:
    details: list[Message] = [_error_info(reason, metadata), *_more(code, reason, _cut(message), metadata)]
    if retry_after_s is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=_duration(retry_after_s)))
    return _status(code, message, details)


def _more(code: str, reason: str, message: str, metadata: Mapping[str, Any]) -> list[Message]:
    """The detail that belongs to an error's code, each type at most once."""
    texts = {str(key): _cut(str(value)) for key, value in metadata.items()}
    if code == "INVALID_ARGUMENT" and texts.get("field"):
        field = error_details_pb2.BadRequest.FieldViolation(field=texts["field"], description=message, reason=reason)
        return [error_details_pb2.BadRequest(field_violations=[field])]
    if code == "NOT_FOUND":
        kind = reason.removesuffix("_NOT_FOUND").lower()
        name = texts.get(kind) or next(iter(texts.values()), "")
        return [error_details_pb2.ResourceInfo(resource_type=kind, resource_name=name, description=message)]
    if code == "FAILED_PRECONDITION":
        obstacle = error_details_pb2.PreconditionFailure.Violation(
            type=reason, subject=next(iter(texts.values()), ""), description=message
        )
        return [error_details_pb2.PreconditionFailure(violations=[obstacle])]
    if code == "RESOURCE_EXHAUSTED":
        subject = texts.get("subject") or texts.get("project") or next(iter(texts.values()), "")
        quota = error_details_pb2.QuotaFailure.Violation(subject=subject, description=message)
        return [error_details_pb2.QuotaFailure(violations=[quota])]
    return []


def _error_info(reason: str, metadata: Mapping[str, Any]) -> error_details_pb2.ErrorInfo:
    texts = {str(key): _cut(str(value)) for key, value in metadata.items()}
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=texts)


def _status(code: str, message: str, details: list[Message]) -> status_pb2.Status:
    status = status_pb2.Status(code=code_pb2.Code.Value(code), message=_cut(message))
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _cut(text: str) -> str:
    """At most ``_MAX_TEXT`` bytes as gRPC encodes them, so that the details always arrive."""
    left = _MAX_TEXT
    for position, character in enumerate(text):
        left -= 1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode(errors="replace"))
        if left < 0:
            return text[:position] + "..."
    return text
