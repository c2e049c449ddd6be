"""Watch streams, image upload and download over a real socket."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from attribution.v1 import attribution_job_pb2 as job_wire
from attribution.v1 import attribution_service_pb2 as wire
from attribution.v1 import attribution_service_pb2_grpc as rpc
from byline.jobs import Stage, Tier

from .conftest import ITEMS, Running, answer, png
from .test_jobs import PARENT, reason, request

State = job_wire.AttributionJob


@pytest.fixture
def stub(served: Running) -> Iterator[Any]:
    with grpc.insecure_channel(served.address) as channel:
        yield rpc.AttributionServiceStub(channel)


def create(stub: Any, tier: Tier = Tier.RETRIEVED) -> tuple[Any, Any]:
    import uuid

    options = job_wire.JobOptions(tier=f"TIER_{tier.value}")
    job = stub.CreateAttributionJob(request(options=options), timeout=5)
    return job, uuid.UUID(job.name.rpartition("/")[2])


def test_a_watcher_sees_the_present_state_first_then_every_tier_and_the_end(stub: Any, served: Running) -> None:
    job, job_id = create(stub, Tier.VERIFIED)
    stream = stub.WatchAttributionJob(wire.WatchAttributionJobRequest(name=job.name), timeout=20)
    first = next(stream).attribution_job
    assert first.state == State.STATE_QUEUED and first.progress.stage == job_wire.Progress.STAGE_LOOKUP
    lookup = served.store.claim(job_id, Stage.LOOKUP, "w", 30.0, "r1")
    assert lookup is not None
    assert next(stream).attribution_job.state == State.STATE_RUNNING
    served.store.complete(lookup, answer(lookup))
    retrieved = next(stream).attribution_job
    assert [a.tier for a in retrieved.answers] == [job_wire.TIER_RETRIEVED]
    assert retrieved.progress.stage == job_wire.Progress.STAGE_VERIFY
    verify = served.store.claim(job_id, Stage.VERIFY, "w", 30.0)
    assert verify is not None
    next(stream)
    served.store.heartbeat(verify, 3, 10, 30.0)
    progressed = next(stream).attribution_job
    assert (progressed.progress.done, progressed.progress.total) == (3, 10)
    served.store.complete(verify, answer(verify))
    *_, last = stream
    done = last.attribution_job
    assert done.state == State.STATE_SUCCEEDED and not done.HasField("progress")
    assert [a.tier for a in done.answers] == [job_wire.TIER_RETRIEVED, job_wire.TIER_VERIFIED]
    assert done.answers[1].influences[0].tau == pytest.approx(0.25) and done.answers[1].draws == 64
    assert done.answers[1].influences[0].item_id == ITEMS[0]


def test_watching_a_finished_job_sends_it_once_and_ends(stub: Any) -> None:
    job, _ = create(stub)
    stub.CancelAttributionJob(wire.CancelAttributionJobRequest(name=job.name), timeout=5)
    (only,) = stub.WatchAttributionJob(wire.WatchAttributionJobRequest(name=job.name), timeout=5)
    assert only.attribution_job.state == State.STATE_CANCELLED


def test_a_watcher_hears_of_the_end_although_a_crash_of_postgres_took_a_revision_back(
    stub: Any, served: Running
) -> None:
    job, job_id = create(stub)
    stream = stub.WatchAttributionJob(wire.WatchAttributionJobRequest(name=job.name), timeout=10)
    next(stream)
    assert served.store.claim(job_id, Stage.LOOKUP, "w", 30.0, "r1") is not None
    assert next(stream).attribution_job.state == State.STATE_RUNNING
    with served.context.engine.begin() as connection:  # what a crash leaves of a claim that was not flushed: nothing
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        connection.exec_driver_sql(
            "UPDATE jobs SET state = 'QUEUED', revision = 1, fence = 0, attempt = 0, lease_owner = NULL,"
            " lease_until = NULL, release_id = NULL, start_time = NULL"
        )
    served.store.cancel("acme", job_id)
    *_, last = stream
    assert last.attribution_job.state == State.STATE_CANCELLED


def test_many_watchers_of_one_job_share_one_listening_connection(stub: Any, served: Running) -> None:
    job, _ = create(stub)
    streams = [stub.WatchAttributionJob(wire.WatchAttributionJobRequest(name=job.name), timeout=20) for _ in range(20)]
    for stream in streams:
        next(stream)
    assert served.context.changes.subscribers == 20
    with served.context.engine.connect() as connection:
        listening = connection.exec_driver_sql(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%%'"
        ).scalar_one()
    assert listening == 1
    stub.CancelAttributionJob(wire.CancelAttributionJobRequest(name=job.name), timeout=5)
    for stream in streams:
        assert [m.attribution_job.state for m in stream] == [State.STATE_CANCELLED]


def test_draining_ends_watches_with_an_error_that_says_watch_again(stub: Any, served: Running) -> None:
    job, _ = create(stub)
    stream = stub.WatchAttributionJob(wire.WatchAttributionJobRequest(name=job.name), timeout=20)
    next(stream)
    served.loop.call_soon_threadsafe(served.gateway.attribution.drain)
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE and reason(caught.value) == "WATCH_ENDED"


def test_a_watcher_that_goes_away_is_forgotten(stub: Any, served: Running) -> None:
    job, _ = create(stub)
    stream = stub.WatchAttributionJob(wire.WatchAttributionJobRequest(name=job.name), timeout=20)
    next(stream)
    gone = threading.Event()
    stream.add_done_callback(lambda _: gone.set())
    stream.cancel()
    assert gone.wait(5)
    deadline = threading.Event()
    for _ in range(100):
        if served.context.changes.subscribers == 0:
            break
        deadline.wait(0.05)
    assert served.context.changes.subscribers == 0


def upload(stub: Any, chunks: list[bytes], **metadata: Any) -> Any:
    head = wire.UploadImageRequest(metadata=wire.UploadImageRequest.Metadata(parent=PARENT, **metadata))
    return stub.UploadImage(iter([head, *(wire.UploadImageRequest(chunk=chunk) for chunk in chunks)]), timeout=5)


def test_an_uploaded_image_is_content_addressed_and_can_be_asked_about(stub: Any) -> None:
    data = png("green", (40, 30))
    digest = hashlib.sha256(data).hexdigest()
    image = upload(stub, [data[:50], data[50:]], size_bytes=len(data), sha256=digest)
    assert image.name == f"{PARENT}/images/{digest}"
    assert (image.media_type, image.width, image.height, image.size_bytes) == ("image/png", 40, 30, len(data))
    assert upload(stub, [data]).name == image.name
    message = wire.CreateAttributionJobRequest(parent=PARENT)
    message.attribution_job.query.image = image.name
    job = stub.CreateAttributionJob(message, timeout=5)
    messages = list(stub.DownloadQueryImage(wire.DownloadQueryImageRequest(name=job.name), timeout=5))
    assert messages[0].image.name == image.name and b"".join(m.chunk for m in messages) == data


@pytest.mark.parametrize(
    ("chunks", "metadata", "expected"),
    [
        ([b"not an image"], {}, "IMAGE_UNDECODABLE"),
        ([png()], {"sha256": "0" * 64}, "INVALID_REQUEST"),
        ([png()], {"size_bytes": 3}, "INVALID_REQUEST"),
        ([], {"size_bytes": 9 * 1024 * 1024}, "IMAGE_TOO_LARGE"),
        ([b"x" * 3_000_000] * 3, {}, "IMAGE_TOO_LARGE"),
    ],
)
def test_an_upload_that_is_not_what_it_claims_is_refused(
    stub: Any, chunks: list[bytes], metadata: dict[str, Any], expected: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        upload(stub, chunks, **metadata)
    assert reason(caught.value) == expected


def test_an_upload_without_metadata_first_is_refused(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.UploadImage(iter([wire.UploadImageRequest(chunk=png())]), timeout=5)
    assert reason(caught.value) == "INVALID_REQUEST"


def test_an_inline_image_over_the_limit_is_sent_to_upload(stub: Any) -> None:
    message = request()
    message.attribution_job.query.inline_image = png() + b"\0" * (3 * 1024 * 1024)
    with pytest.raises(grpc.RpcError) as caught:
        stub.CreateAttributionJob(message, timeout=5)
    assert reason(caught.value) == "IMAGE_TOO_LARGE" and "UploadImage" in caught.value.details()
