"""Jobs over a real socket: create, get, list, cancel, attribute."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from attribution.v1 import attribution_job_pb2 as job_wire
from attribution.v1 import attribution_service_pb2 as wire
from attribution.v1 import attribution_service_pb2_grpc as rpc
from byline.jobs import Stage
from services.gateway import reading

from .conftest import ITEMS, MODEL, AnsweringWorker, Running, answer, influences, manifest, png

PARENT = "projects/acme"


@pytest.fixture
def stub(served: Running) -> Iterator[Any]:
    with grpc.insecure_channel(served.address) as channel:
        yield rpc.AttributionServiceStub(channel)


def request(prompt: str = "a cat", **more: Any) -> wire.CreateAttributionJobRequest:
    query = job_wire.Query(inline_image=png(), prompt=prompt)
    options = more.pop("options", None)
    return wire.CreateAttributionJobRequest(
        parent=PARENT, attribution_job=job_wire.AttributionJob(query=query, options=options), **more
    )


def reason(error: grpc.RpcError) -> str:
    status = rpc_status.from_call(error)
    assert status is not None
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            assert info.domain == "attribution.v1"
            return str(info.reason)
    raise AssertionError("an error without ErrorInfo")


def test_a_created_job_can_be_read_and_does_not_carry_the_bytes_back(stub: Any) -> None:
    job = stub.CreateAttributionJob(request(), timeout=5)
    assert job.state == job_wire.AttributionJob.STATE_QUEUED
    assert job.query.WhichOneof("source") == "image" and job.query.image.startswith(f"{PARENT}/images/")
    assert job.options.tier == job_wire.TIER_RETRIEVED and job.options.top_k == 20
    assert stub.GetAttributionJob(wire.GetAttributionJobRequest(name=job.name), timeout=5) == job


def test_the_same_request_id_gives_the_same_job_and_other_contents_are_refused(stub: Any) -> None:
    request_id = str(uuid.uuid4())
    first = stub.CreateAttributionJob(request(request_id=request_id), timeout=5)
    again = stub.CreateAttributionJob(request(request_id=request_id), timeout=5)
    assert first.name == again.name and first.request_id == request_id
    with pytest.raises(grpc.RpcError) as caught:
        stub.CreateAttributionJob(request("a dog", request_id=request_id), timeout=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and reason(caught.value) == "REQUEST_ID_REUSED"


def test_another_projects_job_does_not_exist(stub: Any) -> None:
    job = stub.CreateAttributionJob(request(), timeout=5)
    foreign = job.name.replace("acme", "other")
    for call, message in (
        (stub.GetAttributionJob, wire.GetAttributionJobRequest(name=foreign)),
        (stub.CancelAttributionJob, wire.CancelAttributionJobRequest(name=foreign)),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call(message, timeout=5)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND and reason(caught.value) == "JOB_NOT_FOUND"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: r.attribution_job.query.ClearField("inline_image"), "INVALID_REQUEST"),
        (lambda r: setattr(r.attribution_job.query, "inline_image", b"GIF89a"), "UNSUPPORTED_MEDIA_TYPE"),
        (lambda r: setattr(r.attribution_job.query, "prompt", "x" * 2001), "PROMPT_TOO_LONG"),
        (lambda r: setattr(r.attribution_job.options, "tier", job_wire.TIER_ESTIMATED), "TIER_NOT_AVAILABLE"),
        (lambda r: setattr(r.attribution_job.options, "top_k", 1001), "INVALID_REQUEST"),
        (lambda r: setattr(r.attribution_job.options, "candidates", 50), "INVALID_REQUEST"),
        (lambda r: setattr(r, "parent", "acme"), "INVALID_REQUEST"),
        (lambda r: setattr(r, "request_id", "7"), "INVALID_REQUEST"),
        (lambda r: setattr(r.attribution_job.query, "image", f"{PARENT}/images/{'0' * 64}"), "BLOB_NOT_FOUND"),
        (lambda r: setattr(r.attribution_job, "model", "models/other"), "MODEL_NOT_FOUND"),
    ],
)
def test_a_request_out_of_bounds_is_refused_with_a_typed_error(stub: Any, change: Any, expected: str) -> None:
    message = request()
    change(message)
    with pytest.raises(grpc.RpcError) as caught:
        stub.CreateAttributionJob(message, timeout=5)
    assert reason(caught.value) == expected


def test_without_an_active_release_the_client_is_told_when_to_come_back(running: Running) -> None:
    with grpc.insecure_channel(running.address) as channel, pytest.raises(grpc.RpcError) as caught:
        rpc.AttributionServiceStub(channel).CreateAttributionJob(request(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE and reason(caught.value) == "NO_ACTIVE_RELEASE"
    status = rpc_status.from_call(caught.value)
    assert any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)


def test_validate_only_creates_nothing(stub: Any) -> None:
    assert stub.CreateAttributionJob(request(validate_only=True), timeout=5).name == ""
    assert not stub.ListAttributionJobs(wire.ListAttributionJobsRequest(parent=PARENT), timeout=5).attribution_jobs


def test_pages_neither_skip_nor_repeat_and_tokens_belong_to_their_listing(stub: Any) -> None:
    batch = wire.BatchCreateAttributionJobsRequest(parent=PARENT, requests=[request(f"cat {i}") for i in range(7)])
    made = stub.BatchCreateAttributionJobs(batch, timeout=5).attribution_jobs
    assert [job.query.prompt for job in made] == [f"cat {i}" for i in range(7)]
    seen: list[str] = []
    token = ""
    while True:
        page = stub.ListAttributionJobs(
            wire.ListAttributionJobsRequest(parent=PARENT, page_size=3, page_token=token), timeout=5
        )
        seen += [job.name for job in page.attribution_jobs]
        token = page.next_page_token or ""
        if not token:
            break
        kept = token
    assert len(seen) == 7 and set(seen) == {job.name for job in made}
    with pytest.raises(grpc.RpcError) as caught:
        stub.ListAttributionJobs(wire.ListAttributionJobsRequest(parent="projects/b", page_token=kept), timeout=5)
    assert reason(caught.value) == "PAGE_TOKEN_INVALID"


def test_what_a_default_client_asks_for_it_can_read_however_large_the_answers(stub: Any, served: Running) -> None:
    asked = [request(f"cat {i}", request_id=str(uuid.uuid4())) for i in range(14)]
    batch = wire.BatchCreateAttributionJobsRequest(parent=PARENT, requests=asked)
    made = stub.BatchCreateAttributionJobs(batch, timeout=20).attribution_jobs
    for job in made:
        claim = served.store.claim(uuid.UUID(job.name.rpartition("/")[2]), Stage.LOOKUP, "in-test", 30.0, "r1")
        assert claim is not None
        large = [{**one, "caption": "x" * 20_000} for one in influences(ITEMS[:20])]
        served.store.complete(claim, {**answer(claim), "influences": large})  # 400 KB each, 5.6 MB in all
    listing = wire.ListAttributionJobsRequest(parent=PARENT, view=wire.JOB_VIEW_FULL)
    seen: list[str] = []
    while True:
        page = stub.ListAttributionJobs(listing, timeout=20)
        assert page.attribution_jobs and all(len(job.answers[0].influences) == 20 for job in page.attribution_jobs)
        seen += [job.name for job in page.attribution_jobs]
        listing.page_token = page.next_page_token
        if not listing.page_token:
            break
    assert sorted(seen) == sorted(job.name for job in made) and len(set(seen)) == len(seen)
    again = stub.BatchCreateAttributionJobs(batch, timeout=20).attribution_jobs
    assert [job.name for job in again] == [job.name for job in made]
    assert again[0].answers and not again[-1].answers
    last = stub.GetAttributionJob(wire.GetAttributionJobRequest(name=again[-1].name), timeout=20)
    assert len(last.answers[0].influences) == 20


def test_a_batch_is_all_or_nothing(stub: Any) -> None:
    batch = wire.BatchCreateAttributionJobsRequest(parent=PARENT, requests=[request("one"), request("x" * 2001)])
    with pytest.raises(grpc.RpcError) as caught:
        stub.BatchCreateAttributionJobs(batch, timeout=5)
    assert reason(caught.value) == "PROMPT_TOO_LONG" and "requests[1].query.prompt" in caught.value.details()
    assert not stub.ListAttributionJobs(wire.ListAttributionJobsRequest(parent=PARENT), timeout=5).attribution_jobs


def test_a_queued_job_is_cancelled_at_once_and_a_finished_one_cannot_be(stub: Any) -> None:
    job = stub.CreateAttributionJob(request(), timeout=5)
    cancelled = stub.CancelAttributionJob(wire.CancelAttributionJobRequest(name=job.name), timeout=5)
    assert cancelled.state == job_wire.AttributionJob.STATE_CANCELLED


def test_a_succeeded_job_is_not_cancellable(stub: Any, worker: AnsweringWorker) -> None:
    done = stub.Attribute(wire.AttributeRequest(parent=PARENT, query=request().attribution_job.query), timeout=10)
    with pytest.raises(grpc.RpcError) as caught:
        stub.CancelAttributionJob(wire.CancelAttributionJobRequest(name=done.attribution_job.name), timeout=5)
    assert reason(caught.value) == "JOB_NOT_CANCELLABLE"


def test_attribute_returns_the_answer_with_its_release(stub: Any, worker: AnsweringWorker) -> None:
    message = wire.AttributeRequest(
        parent=PARENT, query=request().attribution_job.query, options=job_wire.JobOptions(top_k=5)
    )
    job = stub.Attribute(message, timeout=10).attribution_job
    assert job.state == job_wire.AttributionJob.STATE_SUCCEEDED
    (answer,) = job.answers
    assert [influence.item_id for influence in answer.influences] == list(ITEMS[:5])
    assert job.release == answer.release == "models/openclipart/releases/r1"
    assert not answer.influences[0].HasField("tau") and answer.influences[0].cosine == pytest.approx(0.99)


def test_attribute_gives_back_the_unfinished_job_when_the_wait_ends(stub: Any, served: Running) -> None:
    message = wire.AttributeRequest(parent=PARENT, query=request().attribution_job.query)
    message.wait.nanos = 100_000_000
    begun = time.monotonic()
    job = stub.Attribute(message, timeout=10).attribution_job
    assert job.state == job_wire.AttributionJob.STATE_QUEUED and time.monotonic() - begun < 5


def test_attribute_flushes_a_job_before_it_gives_it_back_unfinished(
    stub: Any, served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    original = served.context.jobs.flush
    monkeypatch.setattr(served.context.jobs, "flush", lambda: (flushed.append(1), original()))
    call = wire.AttributeRequest(parent=PARENT, query=request().attribution_job.query)
    call.wait.FromMilliseconds(0)
    assert stub.Attribute(call, timeout=10).attribution_job.state == job_wire.AttributionJob.STATE_QUEUED
    assert flushed == [1]


@pytest.mark.parametrize("when", ["before it is flushed", "while it waits"])
def test_attribute_gives_back_no_job_that_a_crash_of_postgres_forgot(
    when: str, stub: Any, served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's own commit is not waited for on disk, so a crash may take it away."""

    def crash() -> None:
        with served.context.engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM jobs")

    call = wire.AttributeRequest(parent=PARENT, query=request().attribution_job.query)
    if when == "before it is flushed":
        monkeypatch.setattr(served.context.jobs, "flush", crash)
        call.wait.FromMilliseconds(0)
    else:
        first_answer = reading.first_answer
        monkeypatch.setattr(reading, "first_answer", lambda *asked: (crash(), first_answer(*asked))[1])
        call.wait.FromSeconds(5)
    with pytest.raises(grpc.RpcError) as error:
        stub.Attribute(call, timeout=10)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_withdrawn_item_is_in_no_stored_answer(stub: Any, served: Running, worker: AnsweringWorker) -> None:
    message = wire.AttributeRequest(
        parent=PARENT, query=request().attribution_job.query, options=job_wire.JobOptions(top_k=5)
    )
    name = stub.Attribute(message, timeout=10).attribution_job.name
    served.context.catalog.withdraw([ITEMS[0], ITEMS[2]])
    (answer,) = stub.GetAttributionJob(wire.GetAttributionJobRequest(name=name), timeout=5).answers
    assert answer.withdrawn_influences == 2
    assert [i.item_id for i in answer.influences] == [ITEMS[1], *ITEMS[3:7]]
    assert [i.rank for i in answer.influences] == [2, 4, 5, 6, 7]


def test_a_repeated_request_gets_its_job_also_when_the_release_has_changed_since(
    stub: Any, served: Running, tmp_path: Path
) -> None:
    query = job_wire.Query(
        embedding=job_wire.Embedding(values=[0.5] * 4, release="models/openclipart/releases/r1"), prompt="a cat"
    )
    asked = wire.CreateAttributionJobRequest(
        parent=PARENT, attribution_job=job_wire.AttributionJob(query=query), request_id=str(uuid.uuid4())
    )
    first = stub.CreateAttributionJob(asked, timeout=5)
    served.registry.register(manifest("r2"), tmp_path / "r2")
    served.registry.activate(MODEL, "r2")
    assert stub.CreateAttributionJob(asked, timeout=5).name == first.name


def test_an_embedding_of_another_release_or_dimension_is_refused(stub: Any) -> None:
    def ask(values: list[float], release: str) -> Any:
        query = job_wire.Query(
            embedding=job_wire.Embedding(values=values, release=f"models/openclipart/releases/{release}")
        )
        job = job_wire.AttributionJob(query=query)
        return stub.CreateAttributionJob(
            wire.CreateAttributionJobRequest(parent=PARENT, attribution_job=job), timeout=5
        )

    job = ask([0.5, 0.5, 0.5, 0.5], "r1")
    assert list(job.query.embedding.values) == [0.5] * 4 and job.query.embedding.release.endswith("/r1")
    for values, release, expected in (
        ([0.5] * 4, "r0", "RELEASE_NOT_ELIGIBLE"),
        ([0.5] * 3, "r1", "INVALID_REQUEST"),
        ([float("nan")] * 4, "r1", "INVALID_REQUEST"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            ask(values, release)
        assert reason(caught.value) == expected
