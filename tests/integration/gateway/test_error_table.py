"""The table of errors: one bad request of each kind, and the typed reason with its details read back."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from sqlalchemy.exc import OperationalError

from attribution.v1 import attribution_job_pb2 as job_wire
from attribution.v1 import attribution_service_pb2 as wire
from attribution.v1 import attribution_service_pb2_grpc as rpc
from attribution.v1 import operator_service_pb2 as operator_wire
from attribution.v1 import operator_service_pb2_grpc as operator_rpc
from byline.jobs import Stage, Tier
from byline.jobs.admission import Limits

from .conftest import DIM, MODEL, Running, answer, manifest, png
from .test_jobs import PARENT, request

Code = grpc.StatusCode
KINDS = {
    kind.DESCRIPTOR.name: kind
    for kind in (
        error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.ResourceInfo,
        error_details_pb2.PreconditionFailure, error_details_pb2.QuotaFailure, error_details_pb2.RetryInfo,
    )
}  # fmt: skip


class Asking:
    """The stubs of a gateway, and the ways to ask it badly."""

    def __init__(self, served: Running) -> None:
        self.served = served
        self.channel = grpc.insecure_channel(served.address)
        self.jobs = rpc.AttributionServiceStub(self.channel)
        self.operator = operator_rpc.OperatorServiceStub(self.channel)

    def create(self, change: Callable[[Any], object] = lambda r: None, **more: Any) -> Any:
        message = request(**more)
        change(message)
        return self.jobs.CreateAttributionJob(message, timeout=30)

    def image(self, data: bytes) -> Any:
        return self.create(lambda r: setattr(r.attribution_job.query, "inline_image", data))

    def reused(self) -> Any:
        request_id = str(uuid.uuid4())
        self.create(request_id=request_id)
        return self.create(lambda r: setattr(r.attribution_job.query, "prompt", "other"), request_id=request_id)

    def finished(self) -> Any:
        job = self.create()
        claim = self.served.store.claim(uuid.UUID(job.name[-36:]), Stage.LOOKUP, "w", 30.0, "r1")
        assert claim is not None
        self.served.store.complete(claim, answer(claim))
        return self.jobs.CancelAttributionJob(wire.CancelAttributionJobRequest(name=job.name), timeout=30)

    def stale_embedding(self) -> Any:
        query = job_wire.Query(embedding=job_wire.Embedding(values=[1.0] * DIM, release=f"models/{MODEL}/releases/r0"))
        return self.create(lambda r: r.attribution_job.query.CopyFrom(query))

    def full(self) -> Any:
        self.served.context.jobs._limits = Limits({Stage.LOOKUP: 1}, 1.0)
        self.create()
        return self.create()

    def over_quota(self) -> Any:
        self.served.context.jobs._limits = Limits({Stage.LOOKUP: 4}, 0.5)
        for _ in range(4):
            self.create()
        raise AssertionError("half of the queue is the project's share")

    def unreleased(self) -> Any:
        with self.served.context.engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM active_releases")
        return self.create()

    def failing(self, error: Exception) -> Any:
        def fail(*_: Any, **__: Any) -> Any:
            raise error

        self.served.context.jobs.list = fail  # type: ignore[method-assign]
        return self.jobs.ListAttributionJobs(wire.ListAttributionJobsRequest(parent=PARENT), timeout=30)

    def overtaken(self) -> Any:
        release = f"models/{MODEL}/releases/r1"
        return self.operator.ActivateRelease(operator_wire.ActivateReleaseRequest(name=release, epoch=9), timeout=30)

    def rejected(self) -> Any:
        self.served.registry.register(manifest("r2"), self.served.context.blobs.root)
        self.served.registry.reject("r2", "worse")
        release = f"models/{MODEL}/releases/r2"
        return self.operator.ActivateRelease(operator_wire.ActivateReleaseRequest(name=release), timeout=30)

    def pages(self) -> Any:
        return self.jobs.ListAttributionJobs(
            wire.ListAttributionJobsRequest(parent=PARENT, page_token="x"), timeout=30  # noqa: S106
        )

    def deleted_early(self) -> Any:
        return self.jobs.DeleteAttributionJob(wire.DeleteAttributionJobRequest(name=self.create().name), timeout=30)

    def absent(self) -> Any:
        name = f"{PARENT}/attributionJobs/{uuid.uuid4()}"
        return self.jobs.GetAttributionJob(wire.GetAttributionJobRequest(name=name), timeout=30)


BIG = bytearray(png())
BIG[16:24] = (60_000).to_bytes(4, "big") * 2
#: reason: how to ask for it, the code, and what comes with it beside ErrorInfo.
TABLE: dict[str, tuple[Callable[[Asking], Any], Code, set[str]]] = {
    "IMAGE_UNDECODABLE": (lambda ask: ask.image(b"nonsense"), Code.INVALID_ARGUMENT, {"BadRequest"}),
    "IMAGE_TOO_LARGE": (lambda ask: ask.image(bytes(BIG)), Code.INVALID_ARGUMENT, {"BadRequest"}),
    "UNSUPPORTED_MEDIA_TYPE": (lambda ask: ask.image(b"%PDF-1.7"), Code.INVALID_ARGUMENT, {"BadRequest"}),
    "PROMPT_TOO_LONG": (lambda ask: ask.create(prompt="é" * 2_001), Code.INVALID_ARGUMENT, {"BadRequest"}),
    "INVALID_REQUEST": (lambda ask: ask.create(prompt="a\0b"), Code.INVALID_ARGUMENT, {"BadRequest"}),
    "TIER_NOT_AVAILABLE": (
        lambda ask: ask.create(options=job_wire.JobOptions(tier=f"TIER_{Tier.ESTIMATED.value}")),
        Code.INVALID_ARGUMENT, {"BadRequest"},
    ),
    "PAGE_TOKEN_INVALID": (Asking.pages, Code.INVALID_ARGUMENT, {"BadRequest"}),
    "REQUEST_ID_REUSED": (Asking.reused, Code.INVALID_ARGUMENT, {"BadRequest"}),
    "JOB_NOT_FOUND": (Asking.absent, Code.NOT_FOUND, {"ResourceInfo"}),
    "MODEL_NOT_FOUND": (
        lambda ask: ask.create(lambda r: setattr(r.attribution_job, "model", "models/none")),
        Code.NOT_FOUND, {"ResourceInfo"},
    ),
    "JOB_NOT_CANCELLABLE": (Asking.finished, Code.FAILED_PRECONDITION, {"PreconditionFailure"}),
    "JOB_NOT_DELETABLE": (Asking.deleted_early, Code.FAILED_PRECONDITION, {"PreconditionFailure"}),
    "RELEASE_NOT_ELIGIBLE": (Asking.rejected, Code.FAILED_PRECONDITION, {"PreconditionFailure"}),
    "QUEUE_FULL": (Asking.full, Code.UNAVAILABLE, {"RetryInfo"}),
    "QUOTA_EXCEEDED": (Asking.over_quota, Code.RESOURCE_EXHAUSTED, {"QuotaFailure", "RetryInfo"}),
    "NO_ACTIVE_RELEASE": (Asking.unreleased, Code.UNAVAILABLE, {"RetryInfo"}),
    "DATABASE_UNAVAILABLE": (
        lambda ask: ask.failing(OperationalError("SELECT secret", {}, Exception("/var/secret"))),
        Code.UNAVAILABLE, {"RetryInfo"},
    ),
    "ETAG_MISMATCH": (Asking.overtaken, Code.ABORTED, set()),
    "INTERNAL": (lambda ask: ask.failing(KeyError("/var/secret")), Code.INTERNAL, set()),
}  # fmt: skip


@pytest.mark.parametrize("expected", TABLE, ids=str)
def test_a_bad_request_of_each_kind_is_told_its_reason(served: Running, expected: str) -> None:
    ask, code, more = TABLE[expected]
    with pytest.raises(grpc.RpcError) as caught:
        ask(Asking(served))
    assert caught.value.code() is code and "secret" not in caught.value.details()
    found = {}
    for detail in rpc_status.from_call(caught.value).details:
        name = detail.TypeName().rpartition(".")[2]
        assert name not in found, "each type of detail comes once at most"
        found[name] = KINDS[name]()
        detail.Unpack(found[name])
    info = found.pop("ErrorInfo")
    assert (info.reason, info.domain) == (expected, "attribution.v1")
    assert set(found) == more
    assert "secret" not in str(info) + str(found)
    if "BadRequest" in found:
        (violation,) = found["BadRequest"].field_violations
        assert violation.field == info.metadata["field"] and violation.reason == expected
    if expected == "REQUEST_ID_REUSED":
        assert info.metadata["existing_job"]
    if "RetryInfo" in found:
        assert found["RetryInfo"].retry_delay.ToNanoseconds() > 0


def test_an_embedding_of_another_release_is_refused_as_not_eligible(served: Running) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        Asking(served).stale_embedding()
    assert caught.value.code() is Code.FAILED_PRECONDITION
