"""Every error a person or a client can meet, with its stable reason and gRPC code.

Why it exists: one place maps what went wrong to ``google.rpc.Status`` + ``ErrorInfo`` (the gateway's
interceptor and the ``error`` column of a job read the same fields), so synchronous and asynchronous
errors look alike. A message says what to do; every dynamic part of it is repeated in ``metadata``.
This module knows nothing of gRPC: ``code`` is the canonical code's name.
"""

from __future__ import annotations

from typing import ClassVar


class BylineError(Exception):
    """Base of all typed errors. ``reason`` is stable API; the message is for people."""

    reason: ClassVar[str] = "INTERNAL"
    code: ClassVar[str] = "INTERNAL"
    #: Seconds after which a client may try again; None means trying again will not help.
    retry_after_s: float | None = None

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = {k: str(v) for k, v in metadata.items()}

    def to_json(self) -> dict[str, object]:
        """What is stored in ``jobs.error`` and sent in ``AttributionJob.error``."""
        return {"code": self.code, "reason": self.reason, "message": self.message, "metadata": self.metadata}


class InvalidRequest(BylineError):
    """A request field is out of its limits; ``field`` names it."""

    reason = "INVALID_REQUEST"
    code = "INVALID_ARGUMENT"

    def __init__(self, field: str, message: str, **metadata: object) -> None:
        super().__init__(f"{field}: {message}", field=field, **metadata)
        self.field = field


class ImageUndecodable(InvalidRequest):
    """The bytes are not an image of an accepted format, or are broken."""

    reason = "IMAGE_UNDECODABLE"


class ImageTooLarge(InvalidRequest):
    """The image exceeds the limit on bytes or pixels."""

    reason = "IMAGE_TOO_LARGE"


class UnsupportedMediaType(ImageUndecodable):
    """The bytes are an image or document of a format that is not accepted."""

    reason = "UNSUPPORTED_MEDIA_TYPE"


class PromptTooLong(InvalidRequest):
    """The prompt exceeds the limit on characters."""

    reason = "PROMPT_TOO_LONG"


class RequestIdReused(InvalidRequest):
    """The same request_id came with different contents."""

    reason = "REQUEST_ID_REUSED"


class PageTokenInvalid(InvalidRequest):
    """The page token was altered, or belongs to another listing."""

    reason = "PAGE_TOKEN_INVALID"


class JobNotFound(BylineError):
    """No such job in this project (another project's jobs do not exist for the caller)."""

    reason = "JOB_NOT_FOUND"
    code = "NOT_FOUND"


class ModelNotFound(BylineError):
    """No such model is registered."""

    reason = "MODEL_NOT_FOUND"
    code = "NOT_FOUND"


class ReleaseNotFound(BylineError):
    """No such release of this model."""

    reason = "RELEASE_NOT_FOUND"
    code = "NOT_FOUND"


class BackupFailed(BylineError):
    """A backup could not be made, or cannot be restored as it is."""

    reason = "BACKUP_FAILED"
    code = "FAILED_PRECONDITION"


class WorkerNotFound(BylineError):
    """No live worker has this id."""

    reason = "WORKER_NOT_FOUND"
    code = "NOT_FOUND"


class BlobNotFound(BylineError):
    """No blob with this digest is stored."""

    reason = "BLOB_NOT_FOUND"
    code = "NOT_FOUND"


class JobNotCancellable(BylineError):
    """The job is in a terminal state already."""

    reason = "JOB_NOT_CANCELLABLE"
    code = "FAILED_PRECONDITION"


class IllegalTransition(BylineError):
    """The transition table does not allow this change of state."""

    reason = "ILLEGAL_TRANSITION"
    code = "FAILED_PRECONDITION"


class ReleaseNotEligible(BylineError):
    """The release was rejected, is incomplete or belongs to another model."""

    reason = "RELEASE_NOT_ELIGIBLE"
    code = "FAILED_PRECONDITION"


class ReleaseChanged(BylineError):
    """Another activation came first (compare-and-set on the epoch failed)."""

    reason = "ETAG_MISMATCH"
    code = "ABORTED"


class QueueFull(BylineError):
    """The stage's queue is at its bound."""

    reason = "QUEUE_FULL"
    code = "UNAVAILABLE"
    retry_after_s = 2.0


class ServerBusy(BylineError):
    """The gateway has more calls waiting than it can answer in time; nothing was done. Try again."""

    reason = "SERVER_BUSY"
    code = "UNAVAILABLE"
    retry_after_s = 1.0


class QuotaExceeded(BylineError):
    """The project has its share of a stage's queue waiting already; others still get in."""

    reason = "QUOTA_EXCEEDED"
    code = "RESOURCE_EXHAUSTED"
    retry_after_s = 5.0


class NoActiveRelease(BylineError):
    """No release is active for the model yet."""

    reason = "NO_ACTIVE_RELEASE"
    code = "UNAVAILABLE"
    retry_after_s = 5.0


class DatabaseUnavailable(BylineError):
    """Postgres cannot be reached."""

    reason = "DATABASE_UNAVAILABLE"
    code = "UNAVAILABLE"
    retry_after_s = 1.0


class DeadlineExceeded(BylineError):
    """The job's time to live ended before it did."""

    reason = "DEADLINE_EXCEEDED"
    code = "DEADLINE_EXCEEDED"


class AttemptsExhausted(BylineError):
    """The stage failed as often as it may: a dead job, to be retried or discarded by an operator."""

    reason = "ATTEMPTS_EXHAUSTED"
    code = "INTERNAL"


class LeaseLost(BylineError):
    """Another worker holds the job now: stop, write nothing."""

    reason = "LEASE_LOST"
    code = "ABORTED"


class JobCancelled(BylineError):
    """The client asked for cancellation; raised inside a stage at its next check."""

    reason = "JOB_CANCELLED"
    code = "CANCELLED"


class ModelNotUsable(BylineError):
    """A pipeline directory or encoder is missing, of an unknown layout, or not the pinned one."""

    reason = "MODEL_NOT_USABLE"
    code = "FAILED_PRECONDITION"


class CorpusNotUsable(BylineError):
    """A corpus source cannot be read at all (single broken items are only counted)."""

    reason = "CORPUS_NOT_USABLE"
    code = "FAILED_PRECONDITION"


class FeatureMismatch(BylineError):
    """A feature store or query was made with another FeatureSpec or preprocessing."""

    reason = "FEATURE_MISMATCH"
    code = "FAILED_PRECONDITION"


class ReleaseCorrupt(BylineError):
    """A file of a release is missing, altered, or does not reproduce its golden queries."""

    reason = "RELEASE_CORRUPT"
    code = "FAILED_PRECONDITION"


class TeacherNotUsable(BylineError):
    """The teacher's self-check failed (step lost in rounding, wrong sign, factors of another model)."""

    reason = "TEACHER_NOT_USABLE"
    code = "FAILED_PRECONDITION"


class LabelsNotUsable(BylineError):
    """A label snapshot is of another model or corpus, or holds too few rankings."""

    reason = "LABELS_NOT_USABLE"
    code = "FAILED_PRECONDITION"


class SettingsInvalid(BylineError):
    """One or more settings are invalid; the message lists all of them."""

    reason = "SETTINGS_INVALID"
    code = "FAILED_PRECONDITION"


class ServerNotStarted(BylineError):
    """A private server or a service did not come up; the message ends with its log."""

    reason = "SERVER_NOT_STARTED"
    code = "UNAVAILABLE"


class TierNotAvailable(InvalidRequest):
    """The tier asked for is part of the API but not available in this release of the server."""

    reason = "TIER_NOT_AVAILABLE"


class ItemNotFound(BylineError):
    """No such item in this corpus; a withdrawn item does not exist for callers."""

    reason = "ITEM_NOT_FOUND"
    code = "NOT_FOUND"


class CorpusNotFound(BylineError):
    """No corpus is known under this id."""

    reason = "CORPUS_NOT_FOUND"
    code = "NOT_FOUND"


class ReceiptNotFound(BylineError):
    """No withdrawal has such a receipt."""

    reason = "RECEIPT_NOT_FOUND"
    code = "NOT_FOUND"


class WatchEnded(BylineError):
    """A stream has lived as long as it may, or the server is going away: watch again."""

    reason = "WATCH_ENDED"
    code = "UNAVAILABLE"
    retry_after_s = 0.1


class CallTimedOut(BylineError):
    """The call took longer than its deadline, or than the server allows for one call."""

    reason = "CALL_TIMED_OUT"
    code = "DEADLINE_EXCEEDED"


class ServerUnreachable(BylineError):
    """The client could not reach a server, or the answer was no answer of a Byline server."""

    reason = "SERVER_UNREACHABLE"
    code = "UNAVAILABLE"
    retry_after_s = 1.0


class ItemWithdrawn(BylineError):
    """An item of an answer was withdrawn before the answer was committed: the stage runs again without it."""

    reason = "ITEM_WITHDRAWN"
    code = "ABORTED"
    retry_after_s = 0.0


class StageInputMissing(BylineError):
    """A stage cannot run because what an earlier stage should have left is not there."""

    reason = "STAGE_INPUT_MISSING"
    code = "INTERNAL"


class WorkerStopping(BylineError):
    """The worker is shutting down: its job goes back to the queue without costing an attempt."""

    reason = "WORKER_STOPPING"
    code = "UNAVAILABLE"
    retry_after_s = 0.0


class GaveWay(WorkerStopping):
    """A long stage stopped between two chunks because a client waits: it goes on later, behind what it kept."""

    reason = "GAVE_WAY"


class JobNotRetryable(BylineError):
    """Only a dead job (attempts used up) can be retried or discarded."""

    reason = "JOB_NOT_RETRYABLE"
    code = "FAILED_PRECONDITION"


class LeaseExpired(BylineError):
    """A worker fell silent: it died, hangs, or cannot reach the database. The stage is tried again."""

    reason = "LEASE_EXPIRED"
    code = "UNAVAILABLE"


class BrokerUnavailable(BylineError):
    """Redis cannot be reached: doorbells wait in Postgres until it can."""

    reason = "BROKER_UNAVAILABLE"
    code = "UNAVAILABLE"
    retry_after_s = 1.0


class CallFailed(BylineError):
    """The server refused a call with a reason this client does not know (``metadata`` has it), or crashed."""

    reason = "CALL_FAILED"


class ModelMismatch(BylineError):
    """A worker was given work for another model, or another revision of it, than it has loaded."""

    reason = "MODEL_MISMATCH"
    code = "FAILED_PRECONDITION"
