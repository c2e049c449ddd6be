"""What the alerts rest on: every call is counted once at its end, under a label that no caller can make up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from attribution.v1 import attribution_service_pb2 as wire
from attribution.v1 import attribution_service_pb2_grpc as rpc
from byline.telemetry import RPC_SECONDS
from services.gateway import reading

from .conftest import Running
from .test_jobs import request

WATCH, DOWNLOAD = "AttributionService/WatchAttributionJob", "AttributionService/DownloadQueryImage"
NO_JOB = "projects/default/attributionJobs/00000000-0000-0000-0000-000000000000"


@pytest.fixture
def stub(served: Running) -> Iterator[Any]:
    with grpc.insecure_channel(served.address) as channel:
        yield rpc.AttributionServiceStub(channel)


def count(method: str, code: str) -> float:
    samples = (sample for metric in RPC_SECONDS.collect() for sample in metric.samples)
    return sum(
        sample.value for sample in samples
        if sample.name == "byline_rpc_seconds_count" and sample.labels == {"method": method, "code": code}
    )  # fmt: skip


def rises_to(method: str, code: str, expected: float) -> bool:
    """A call is counted after its status was sent."""
    until = time.monotonic() + 20
    while count(method, code) < expected and time.monotonic() < until:
        time.sleep(0.01)
    return count(method, code) == expected


def test_methods_that_strangers_make_up_are_counted_under_one_label(served: Running) -> None:
    before = count("unknown", "UNIMPLEMENTED")
    with grpc.insecure_channel(served.address) as channel:
        for made_up in range(20):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(f"/attribution.v1.AttributionService/NoSuch{made_up}")(b"", timeout=20)
    assert rises_to("unknown", "UNIMPLEMENTED", before + 20)
    labels = {sample.labels["method"] for metric in RPC_SECONDS.collect() for sample in metric.samples}
    assert not any("NoSuch" in label for label in labels)


def test_a_stream_that_fails_is_counted_with_the_code_of_its_end(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    missing, broken = count(DOWNLOAD, "NOT_FOUND"), count(WATCH, "INTERNAL")
    with pytest.raises(grpc.RpcError):
        list(stub.DownloadQueryImage(wire.DownloadQueryImageRequest(name=NO_JOB), timeout=20))
    assert rises_to(DOWNLOAD, "NOT_FOUND", missing + 1)

    def bug(*arguments: Any, **more: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(reading, "changed", bug)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.WatchAttributionJob(wire.WatchAttributionJobRequest(name=NO_JOB), timeout=20))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert rises_to(WATCH, "INTERNAL", broken + 1)


def test_a_watch_that_ends_as_announced_is_no_failure_and_its_life_is_no_latency(
    stub: Any, served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = stub.CreateAttributionJob(request(), timeout=20)
    well, unavailable, cancelled = (count(WATCH, code) for code in ("OK", "UNAVAILABLE", "CANCELLED"))
    left = stub.WatchAttributionJob(wire.WatchAttributionJobRequest(name=job.name), timeout=60)
    next(left)
    left.cancel()
    assert rises_to(WATCH, "CANCELLED", cancelled + 1)
    seen: list[float] = []
    monkeypatch.setattr(served.gateway.attribution, "_watch_s", 1.0)
    monkeypatch.setattr(RPC_SECONDS.labels(WATCH, "OK"), "observe", seen.append)
    begun = time.monotonic()
    with pytest.raises(grpc.RpcError):
        list(stub.WatchAttributionJob(wire.WatchAttributionJobRequest(name=job.name), timeout=60))
    lived = time.monotonic() - begun
    until = time.monotonic() + 20
    while not seen and time.monotonic() < until:
        time.sleep(0.01)
    assert lived >= 1.0 and len(seen) == 1 and seen[0] < lived - 0.5
    assert (count(WATCH, "OK"), count(WATCH, "UNAVAILABLE")) == (well, unavailable)
