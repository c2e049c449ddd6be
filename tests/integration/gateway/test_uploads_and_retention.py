"""Uploads that go on where they broke, images that belong to their project, and forgetting."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from sqlalchemy import text

from attribution.v1 import attribution_service_pb2 as wire
from attribution.v1 import attribution_service_pb2_grpc as rpc
from byline.client import Client
from byline.errors import BlobNotFound, JobNotFound
from byline.security.errors import JobNotDeletable
from byline.security.retention import Retention
from services.gateway.uploads import FOLDER, KEPT_S

from .conftest import Running, png
from .test_jobs import PARENT, reason
from .test_watch_and_images import upload

DATA = png("purple", (64, 64))
DIGEST = hashlib.sha256(DATA).hexdigest()
NAME = f"{PARENT}/images/{DIGEST}"


@pytest.fixture
def stub(served: Running) -> Iterator[Any]:
    with grpc.insecure_channel(served.address) as channel:
        yield rpc.AttributionServiceStub(channel)


def broken_upload(stub: Any, served: Running, sent: int) -> None:
    """A client that sends the first bytes and goes away."""
    go = threading.Event()

    def messages() -> Iterator[Any]:
        metadata = wire.UploadImageRequest.Metadata(parent=PARENT, size_bytes=len(DATA), sha256=DIGEST)
        yield wire.UploadImageRequest(metadata=metadata)
        yield wire.UploadImageRequest(chunk=DATA[:sent])
        go.wait(30)

    call = stub.UploadImage.future(messages(), timeout=60)
    time.sleep(0.3)  # not for luck: what is kept is waited for below, this only lets the bytes leave the client
    call.cancel()
    go.set()
    until = time.monotonic() + 30
    while committed(stub) != sent:
        assert time.monotonic() < until, "what was sent is not kept"
        time.sleep(0.02)


def committed(stub: Any) -> int:
    return int(stub.GetImageUpload(wire.GetImageUploadRequest(name=NAME), timeout=20).committed_bytes)


def test_a_broken_upload_goes_on_where_it_broke_and_ends_as_the_same_image(stub: Any, served: Running) -> None:
    assert committed(stub) == 0
    broken_upload(stub, served, 100)
    state = stub.GetImageUpload(wire.GetImageUploadRequest(name=NAME), timeout=20)
    assert state.committed_bytes == 100 and not state.HasField("image")
    with pytest.raises(grpc.RpcError) as caught:
        upload(stub, [DATA[150:]], size_bytes=len(DATA), sha256=DIGEST, offset=150)
    assert reason(caught.value) == "INVALID_REQUEST"
    with pytest.raises(grpc.RpcError) as caught:
        upload(stub, [], size_bytes=len(DATA), sha256=DIGEST, offset=2**53)
    assert reason(caught.value) == "INVALID_REQUEST"
    image = upload(stub, [DATA[100:]], size_bytes=len(DATA), sha256=DIGEST, offset=100)
    assert image.name == NAME
    state = stub.GetImageUpload(wire.GetImageUploadRequest(name=NAME), timeout=20)
    assert state.image == image and state.committed_bytes == len(DATA)
    assert not list((served.context.blobs.root / FOLDER).rglob("*.part"))


def test_what_goes_on_with_other_bytes_is_refused_and_forgotten(stub: Any, served: Running) -> None:
    broken_upload(stub, served, 100)
    with pytest.raises(grpc.RpcError) as caught:
        upload(stub, [b"x" * (len(DATA) - 100)], size_bytes=len(DATA), sha256=DIGEST, offset=100)
    assert reason(caught.value) == "INVALID_REQUEST" and committed(stub) == 0


def test_parts_are_forgotten_after_a_day(stub: Any, served: Running) -> None:
    broken_upload(stub, served, 100)
    assert served.context.uploads.sweep(time.time() + KEPT_S - 60) == 0
    assert served.context.uploads.sweep(time.time() + KEPT_S + 60) == 1 and committed(stub) == 0


def test_an_image_belongs_to_the_project_that_sent_it(served: Running) -> None:
    with Client(served.address, "acme") as owner, Client(served.address, "rival") as rival:
        name = owner.upload(DATA)
        assert name == NAME
        stub = rpc.AttributionServiceStub(grpc.insecure_channel(served.address))
        theirs = f"projects/rival/images/{DIGEST}"
        assert not stub.GetImageUpload(wire.GetImageUploadRequest(name=theirs), timeout=20).committed_bytes
        message = wire.CreateAttributionJobRequest(parent="projects/rival")
        message.attribution_job.query.image = theirs
        with pytest.raises(grpc.RpcError) as caught:
            stub.CreateAttributionJob(message, timeout=20)
        assert reason(caught.value) == "BLOB_NOT_FOUND"
        rival.upload(DATA)
        assert stub.CreateAttributionJob(message, timeout=20).name


def aged(served: Running, sha256: str) -> None:
    old = time.time() - 3600
    os.utime(served.context.blobs.path(sha256), (old, old))


def test_a_deleted_job_is_gone_with_its_image_and_its_prompt_but_not_from_the_audit(served: Running) -> None:
    with Client(served.address, "acme") as client:
        job = client.submit(DATA, "my own prompt")
        with pytest.raises(JobNotDeletable):
            client.delete(job)
        client.cancel(job)
        aged(served, DIGEST)
        client.delete(job)
        for call in (client.get, client.delete, client.query_image):
            with pytest.raises(JobNotFound):
                call(job)
    with pytest.raises(BlobNotFound):
        served.context.blobs.get(DIGEST)
    with served.context.engine.connect() as connection:
        for table in ("jobs", "job_events", "job_results", "uploads"):
            assert connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one() == 0
        told = connection.execute(text("SELECT action FROM audit_events ORDER BY id")).scalars().all()
    assert "CreateAttributionJob" in told and "DeleteAttributionJob" in told


def test_an_image_that_something_else_needs_outlives_the_job(served: Running) -> None:
    in_corpus = png("blue")  # the items of the fixture have it
    with Client(served.address, "acme") as client, Client(served.address, "rival") as rival:
        first, second = client.submit(DATA, "a"), rival.submit(DATA, "b")
        third = client.submit(in_corpus, "c")
        for job in (first, third):
            client.cancel(job)
        aged(served, DIGEST)
        aged(served, hashlib.sha256(in_corpus).hexdigest())
        client.delete(first)
        client.delete(third)
        assert rival.query_image(second) == DATA
    assert served.context.blobs.get(hashlib.sha256(in_corpus).hexdigest()) == in_corpus


def test_an_image_just_stored_for_a_job_that_is_not_committed_yet_is_left_and_removed_by_a_later_sweep(
    served: Running,
) -> None:
    with Client(served.address, "acme") as client:
        job = client.submit(DATA, "a")
        client.cancel(job)
        client.delete(job)
        assert served.context.blobs.get(DIGEST) == DATA  # stored a moment ago: somebody may be about to use it
        aged(served, DIGEST)
        assert served.context.retention.sweep() == 0
    with pytest.raises(BlobNotFound):
        served.context.blobs.get(DIGEST)


def test_what_ended_long_enough_ago_is_forgotten_and_nothing_else(served: Running) -> None:
    context = served.context
    with Client(served.address, "acme") as client:
        old, young, live = (client.submit(DATA, str(uuid.uuid4())) for _ in range(3))
        client.cancel(old)
        client.cancel(young)
        with context.engine.begin() as connection:
            connection.execute(text("SET LOCAL session_replication_role = replica"))
            long_ago = text("UPDATE jobs SET end_time = now() - interval '8 days' WHERE id = :id")
            connection.execute(long_ago, {"id": old.id})
        retention = Retention(context.engine, context.blobs, days=7)
        assert Retention(context.engine, context.blobs, days=0).sweep() == 0
        assert retention.sweep() == 1 and retention.sweep() == 0
        with pytest.raises(JobNotFound):
            client.get(old)
        assert (client.get(young).state, client.get(live).state) == ("CANCELLED", "QUEUED")
        assert client.query_image(live) == DATA

