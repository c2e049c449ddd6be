"""Every call the client can make, as data: which method, which request, how to read the response.

Why it exists: the sync and the async client differ in how they wait and in nothing else, so what they send
and how they read it is written once, here.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from attribution.v1 import attribution_job_pb2 as job_wire
from attribution.v1 import attribution_service_pb2 as wire_requests
from attribution.v1 import catalog_service_pb2 as catalog_wire
from attribution.v1 import operator_service_pb2 as operator_wire
from byline.client import values, wire
from byline.errors import InvalidRequest

T = TypeVar("T")

#: Above this an image is uploaded first (the server takes 3 MiB inline).
INLINE_BYTES = 3 * 1024 * 1024
CHUNK_BYTES = 256 * 1024

#: UNAVAILABLE only: the server says so when trying again helps, and request ids make it safe. Of the operator's
#: calls only those are tried again whose second execution changes nothing. ActivateRelease and RollbackRelease are
#: not: an answer can be lost after the change was made, and a second rollback would undo the first.
_REPEATABLE_OPERATOR_CALLS = (
    "ListReleases", "GetQueueStatus", "ListDeadJobs", "RetryDeadJob", "DiscardDeadJob", "PauseStage", "ResumeStage",
    "DrainWorker", "ResumeWorker", "ListJobEvents",
)  # fmt: skip
SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [
                    {"service": "attribution.v1.AttributionService"},
                    {"service": "attribution.v1.CatalogService"},
                    {"service": "attribution.v1.CurationService"},
                    {"service": "attribution.v1.ReleaseService"},
                    *(
                        {"service": "attribution.v1.OperatorService", "method": method}
                        for method in _REPEATABLE_OPERATOR_CALLS
                    ),
                ],
                "retryPolicy": {
                    "maxAttempts": 4, "initialBackoff": "0.2s", "maxBackoff": "3s", "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
        "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.2},
    }
)  # fmt: skip
#: An item's image comes in one message, and the server may allow larger ones than its default of 8 MiB.
_MAX_RECEIVED = 64 * 1024 * 1024
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_RECEIVED),
    ("grpc.service_config", SERVICE_CONFIG),
    ("grpc.enable_retries", 1),
    ("grpc.keepalive_time_ms", 60_000),
]


@dataclass(frozen=True)
class Call(Generic[T]):
    """One unary call."""

    service: str
    method: str
    request: Any
    read: Callable[[Any], T]


@dataclass(frozen=True)
class Query:
    """The query of a request: bytes, an uploaded image's name, or an embedding with its release."""

    prompt: str
    data: bytes | None = None
    image: str = ""
    embedding: Sequence[float] = ()
    release: str = ""

    def message(self) -> job_wire.Query:
        """As a message; ``data`` goes inline."""
        if self.data is not None:
            return job_wire.Query(prompt=self.prompt, inline_image=self.data)
        if self.image:
            return job_wire.Query(prompt=self.prompt, image=self.image)
        embedding = job_wire.Embedding(values=self.embedding, release=self.release)
        return job_wire.Query(prompt=self.prompt, embedding=embedding)


class Calls:
    """Builds calls for one project (and, where none is named, one model)."""

    def __init__(self, project: str, model: str) -> None:
        self.parent = f"projects/{project}"
        self._model = f"models/{model}" if model else ""

    def job_name(self, job: str | values.Job) -> str:
        """The resource name of a job given as value, name or bare id."""
        name = job.name if isinstance(job, values.Job) else job
        return name if "/" in name else f"{self.parent}/attributionJobs/{name}"

    def create(self, query: Query, options: job_wire.JobOptions, request_id: str | None) -> Call[values.Job]:
        """CreateAttributionJob. A request id is made up where none is given, so that a retry is safe."""
        job = job_wire.AttributionJob(model=self._model, query=query.message(), options=options)
        request = wire_requests.CreateAttributionJobRequest(
            parent=self.parent, attribution_job=job, request_id=request_id or str(uuid.uuid4())
        )
        return Call("AttributionService", "CreateAttributionJob", request, wire.job)

    def attribute(self, query: Query, options: job_wire.JobOptions, request_id: str | None) -> Call[values.Job]:
        """Attribute."""
        request = wire_requests.AttributeRequest(
            parent=self.parent, model=self._model, query=query.message(), options=options,
            request_id=request_id or str(uuid.uuid4()),
        )  # fmt: skip
        return Call("AttributionService", "Attribute", request, lambda r: wire.job(r.attribution_job))

    def get(self, job: str | values.Job) -> Call[values.Job]:
        """GetAttributionJob."""
        request = wire_requests.GetAttributionJobRequest(name=self.job_name(job))
        return Call("AttributionService", "GetAttributionJob", request, wire.job)

    def cancel(self, job: str | values.Job) -> Call[values.Job]:
        """CancelAttributionJob."""
        request = wire_requests.CancelAttributionJobRequest(name=self.job_name(job))
        return Call("AttributionService", "CancelAttributionJob", request, wire.job)

    def delete(self, job: str | values.Job) -> Call[None]:
        """DeleteAttributionJob."""
        request = wire_requests.DeleteAttributionJobRequest(name=self.job_name(job))
        return Call("AttributionService", "DeleteAttributionJob", request, _nothing)

    def committed(self, data: bytes) -> Call[int]:
        """GetImageUpload: how many bytes of the image the server has."""
        name = f"{self.parent}/images/{hashlib.sha256(data).hexdigest()}"
        request = wire_requests.GetImageUploadRequest(name=name)
        return Call("AttributionService", "GetImageUpload", request, lambda r: int(r.committed_bytes))

    def page(self, states: Sequence[str], size: int, token: str) -> Call[tuple[list[values.Job], str]]:
        """One page of ListAttributionJobs, and the token of the next."""
        request = wire_requests.ListAttributionJobsRequest(
            parent=self.parent, page_size=size, page_token=token,
            states=[_number(job_wire.AttributionJob.State, "STATE_", state, "states") for state in states],
        )  # fmt: skip
        return Call(
            "AttributionService", "ListAttributionJobs", request,
            lambda r: ([wire.job(message) for message in r.attribution_jobs], r.next_page_token),
        )  # fmt: skip

    def releases(
        self, model: str, token: str = ""
    ) -> Call[tuple[list[values.Release], values.ActiveRelease | None, str]]:
        """One page of ListReleases, what is active, and the token of the next page."""
        request = operator_wire.ListReleasesRequest(parent=f"models/{model}", page_token=token)
        return Call(
            "OperatorService", "ListReleases", request,
            lambda r: (
                [wire.release(message) for message in r.releases],
                wire.active_release(r.active) if r.HasField("active") else None,
                r.next_page_token,
            ),
        )  # fmt: skip

    def activate(self, model: str, release: str, epoch: int | None, reason: str) -> Call[values.ActiveRelease]:
        """ActivateRelease, by release id or name."""
        name = release if "/" in release else f"models/{model}/releases/{release}"
        request = operator_wire.ActivateReleaseRequest(name=name, epoch=epoch, reason=reason)
        return Call("OperatorService", "ActivateRelease", request, wire.active_release)

    def rollback(self, model: str, epoch: int | None, reason: str) -> Call[values.ActiveRelease]:
        """RollbackRelease. Give the epoch: without it a second execution would undo the first."""
        request = operator_wire.RollbackReleaseRequest(model=f"models/{model}", epoch=epoch, reason=reason)
        return Call("OperatorService", "RollbackRelease", request, wire.active_release)

    def queues(self) -> Call[values.QueueStatus]:
        """GetQueueStatus."""
        request = operator_wire.GetQueueStatusRequest()
        return Call("OperatorService", "GetQueueStatus", request, wire.queue_status)

    def pause(self, stage: str, paused: bool) -> Call[None]:
        """PauseStage or ResumeStage."""
        if paused:
            return Call("OperatorService", "PauseStage", operator_wire.PauseStageRequest(stage=stage), _nothing)
        return Call("OperatorService", "ResumeStage", operator_wire.ResumeStageRequest(stage=stage), _nothing)

    def withdraw(self, corpus: str, item_ids: Sequence[int], reason: str) -> Call[values.Withdrawal]:
        """WithdrawItems."""
        request = catalog_wire.WithdrawItemsRequest(parent=f"corpora/{corpus}", item_ids=item_ids, reason=reason)
        return Call("CatalogService", "WithdrawItems", request, wire.withdrawal)

    def item_image(self, item: str) -> Call[bytes]:
        """GetItemImage, by resource name."""
        return Call("CatalogService", "GetItemImage", catalog_wire.GetItemImageRequest(name=item), lambda r: r.data)

    def watch(self, job: str | values.Job) -> wire_requests.WatchAttributionJobRequest:
        """The request of WatchAttributionJob."""
        return wire_requests.WatchAttributionJobRequest(name=self.job_name(job))

    def upload(self, data: bytes, offset: int = 0) -> Iterator[wire_requests.UploadImageRequest]:
        """The messages of UploadImage, from ``offset`` on."""
        metadata = wire_requests.UploadImageRequest.Metadata(
            parent=self.parent, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), offset=offset
        )
        yield wire_requests.UploadImageRequest(metadata=metadata)
        for start in range(offset, len(data), CHUNK_BYTES):
            yield wire_requests.UploadImageRequest(chunk=data[start : start + CHUNK_BYTES])

    def download(self, job: str | values.Job) -> wire_requests.DownloadQueryImageRequest:
        """The request of DownloadQueryImage."""
        return wire_requests.DownloadQueryImageRequest(name=self.job_name(job))


def epoch_of(active: values.ActiveRelease | None) -> int:
    """The epoch that stands for what is active now; 0 for "none is"."""
    return active.epoch if active is not None else 0


def job_options(
    tier: str, top_k: int | None, candidates: int | None, best_effort: bool, ttl_s: float | None,
    labelling_consent: bool = False,
) -> job_wire.JobOptions:  # fmt: skip
    """Options of a job; None means the server's default. InvalidRequest for a tier that does not exist."""
    options = job_wire.JobOptions(
        tier=_number(job_wire.Tier, "TIER_", tier, "tier"), top_k=top_k, candidates=candidates,
        verification=job_wire.VERIFICATION_BEST_EFFORT if best_effort else job_wire.VERIFICATION_REQUIRED,
        labelling_consent=labelling_consent,
    )  # fmt: skip
    if ttl_s is not None:
        options.ttl.FromNanoseconds(round(ttl_s * 1e9))
    return options


def image_bytes(image: values.ImageSource) -> bytes:
    """The file's bytes of a path, of bytes, or of a PIL image (as PNG). InvalidRequest if the file cannot be read."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, (str, os.PathLike)):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise InvalidRequest("image", f"cannot read {os.fspath(image)}: {error.strerror}") from error
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _number(kind: Any, prefix: str, name: str, field: str) -> Any:
    try:
        return kind.Value(f"{prefix}{name.upper()}")
    except ValueError as error:
        known = ", ".join(key.removeprefix(prefix) for key in kind.keys() if not key.endswith("UNSPECIFIED"))  # noqa: SIM118
        raise InvalidRequest(field, f"{name} is unknown; choose one of {known}") from error


def _nothing(message: Any) -> None:
    del message
