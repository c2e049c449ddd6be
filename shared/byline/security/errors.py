"""Errors of identity, permission, limits, audit and signatures.

Why it exists: ``byline.errors`` states the rules for all typed errors; these belong to security alone and would have
made that file too long. A refusal never says more than its caller may know.
"""

from __future__ import annotations

from byline.errors import BylineError, InvalidRequest


class Unauthenticated(BylineError):
    """No API key came with the call, or one that is unknown, revoked or expired: which of these is not said."""

    reason = "API_KEY_INVALID"
    code = "UNAUTHENTICATED"


class ScopeMissing(BylineError):
    """The key is good, but not for this method."""

    reason = "SCOPE_MISSING"
    code = "PERMISSION_DENIED"


class ProjectForbidden(BylineError):
    """The key belongs to another project than the request names, whether that project exists or not."""

    reason = "PROJECT_FORBIDDEN"
    code = "PERMISSION_DENIED"


class RateLimited(BylineError):
    """More calls than the key or its project may make; ``retry_after_s`` says when the next one is let through."""

    reason = "RATE_LIMITED"
    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_s: float, **metadata: object) -> None:
        super().__init__(message, **metadata)
        self.retry_after_s = retry_after_s


class KeyNotFound(BylineError):
    """No API key has this id."""

    reason = "API_KEY_NOT_FOUND"
    code = "NOT_FOUND"


class MethodUnknown(BylineError):
    """The server has no such method."""

    reason = "METHOD_UNKNOWN"
    code = "UNIMPLEMENTED"


class MalformedRequest(InvalidRequest):
    """The bytes of the call are not a message of this method."""

    reason = "MALFORMED_REQUEST"


class JobNotDeletable(BylineError):
    """The job has not ended: cancel it first."""

    reason = "JOB_NOT_DELETABLE"
    code = "FAILED_PRECONDITION"


class AuditBroken(BylineError):
    """The audit's hash chain does not hold: an event was changed, removed or put in."""

    reason = "AUDIT_BROKEN"
    code = "DATA_LOSS"


class SignatureInvalid(BylineError):
    """A release's manifest is not signed by a key this process trusts: its files are not opened."""

    reason = "SIGNATURE_INVALID"
    code = "FAILED_PRECONDITION"
