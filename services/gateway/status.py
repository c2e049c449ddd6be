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
#: gRPC sends the status as HTTP/2 headers, 8 KiB in all: long texts are cut.
_MAX_TEXT = 1_000


def from_error(error: BylineError) -> status_pb2.Status:
    """The status of a typed error with ErrorInfo, BadRequest (wrong fields) and RetryInfo (worth trying again)."""
    details: list[Message] = [_error_info(error.reason, error.metadata)]
    field = error.metadata.get("field")
    if field and error.code == "INVALID_ARGUMENT":
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=field, description=_cut(error.message), reason=error.reason
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=_duration(error.retry_after_s)))
    return _status(error.code, error.message, details)


def from_stored(error: Mapping[str, Any]) -> status_pb2.Status:
    """The status of an error stored with a job (``BylineError.to_json``)."""
    metadata = error.get("metadata") or {}
    reason = str(error.get("reason") or "INTERNAL")
    return _status(
        str(error.get("code") or "INTERNAL"), str(error.get("message") or ""), [_error_info(reason, metadata)]
    )


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
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"
