"""Releases, queues, catalogue, health and reflection over a real socket."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from attribution.v1 import attribution_job_pb2 as job_wire
from attribution.v1 import catalog_service_pb2 as catalog
from attribution.v1 import catalog_service_pb2_grpc as catalog_rpc
from attribution.v1 import operator_service_pb2 as wire
from attribution.v1 import operator_service_pb2_grpc as rpc
from attribution.v1 import release_pb2
from byline.client import Client
from byline.errors import DatabaseUnavailable
from byline.jobs import Kind, NewJob, Stage, Tier
from byline.jobs.store import JobStore
from services.gateway import operator_servicer

from .conftest import ITEMS, MODEL, Running, manifest, png
from .test_jobs import reason


@pytest.fixture
def channel(served: Running) -> Iterator[Any]:
    with grpc.insecure_channel(served.address) as channel:
        yield channel


def test_activation_is_conditional_and_rollback_returns(channel: Any, served: Running, tmp_path: Path) -> None:
    stub = rpc.OperatorServiceStub(channel)
    served.registry.register(manifest("r2", parent="r1"), tmp_path / "r2")
    listed = stub.ListReleases(wire.ListReleasesRequest(parent=f"models/{MODEL}"), timeout=5)
    assert [r.name.rpartition("/")[2] for r in listed.releases] == ["r2", "r1"]
    assert listed.releases[0].state == release_pb2.Release.STATE_BUILT
    assert dict(listed.releases[0].metrics) == {"map": 0.5, "gate.p": 0.01}
    stale = wire.ActivateReleaseRequest(name=f"models/{MODEL}/releases/r2", epoch=listed.active.epoch + 1)
    with pytest.raises(grpc.RpcError) as caught:
        stub.ActivateRelease(stale, timeout=5)
    assert caught.value.code() is grpc.StatusCode.ABORTED and reason(caught.value) == "ETAG_MISMATCH"
    active = stub.ActivateRelease(
        wire.ActivateReleaseRequest(name=f"models/{MODEL}/releases/r2", epoch=listed.active.epoch), timeout=5
    )
    assert active.release.endswith("/r2") and active.previous_release.endswith("/r1")
    back = stub.RollbackRelease(wire.RollbackReleaseRequest(model=f"models/{MODEL}"), timeout=5)
    assert back.release.endswith("/r1") and back.epoch == active.epoch + 1


def test_an_unknown_release_is_not_found(channel: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        rpc.OperatorServiceStub(channel).ActivateRelease(
            wire.ActivateReleaseRequest(name=f"models/{MODEL}/releases/none"), timeout=5
        )
    assert reason(caught.value) == "RELEASE_NOT_FOUND"


def test_a_stage_can_be_paused_and_resumed(channel: Any) -> None:
    stub = rpc.OperatorServiceStub(channel)
    assert stub.PauseStage(wire.PauseStageRequest(stage="verify"), timeout=5).paused
    stages = {s.stage: s for s in stub.GetQueueStatus(wire.GetQueueStatusRequest(), timeout=5).stages}
    assert stages["verify"].paused and not stages["lookup"].paused
    assert not stub.ResumeStage(wire.ResumeStageRequest(stage="verify"), timeout=5).paused
    with pytest.raises(grpc.RpcError) as caught:
        stub.PauseStage(wire.PauseStageRequest(stage="tea"), timeout=5)
    assert reason(caught.value) == "INVALID_REQUEST"


def dead_ranking_job(store: JobStore) -> str:
    """The name of a ranking job, as curation makes them, that used up its attempts."""
    new = NewJob(
        project_id="byline-curation", request_id=str(uuid.uuid4()), model_id=MODEL, prompt="a cat", kind=Kind.RANKING,
        image_sha256="0" * 64, tier=Tier.VERIFIED, payload={"query_id": str(uuid.uuid4())}, max_attempts=1,
    )  # fmt: skip
    job, _ = store.create(new)
    claim = store.claim(job.id, Stage.RANK, "in-test", 30.0, "r1")
    assert claim is not None
    store.fail(claim, DatabaseUnavailable("the teacher broke"), retry=True)
    return f"projects/byline-curation/attributionJobs/{job.id}"


def test_dead_ranking_jobs_that_are_listed_can_be_retried_and_discarded(channel: Any, served: Running) -> None:
    stub = rpc.OperatorServiceStub(channel)
    listing = wire.ListDeadJobsRequest(parent="projects/byline-curation")
    first, second = dead_ranking_job(served.store), dead_ranking_job(served.store)
    assert {job.name for job in stub.ListDeadJobs(listing, timeout=5).attribution_jobs} == {first, second}
    with pytest.raises(grpc.RpcError) as caught:
        stub.RetryDeadJob(wire.RetryDeadJobRequest(name=first.replace("byline-curation", "default")), timeout=5)
    assert reason(caught.value) == "JOB_NOT_FOUND"
    fresh = stub.RetryDeadJob(wire.RetryDeadJobRequest(name=first), timeout=5)
    assert fresh.name != first and fresh.state == job_wire.AttributionJob.STATE_QUEUED
    assert stub.RetryDeadJob(wire.RetryDeadJobRequest(name=first), timeout=5).name == fresh.name
    assert stub.DiscardDeadJob(wire.DiscardDeadJobRequest(name=second), timeout=5).name == second
    assert not stub.ListDeadJobs(listing, timeout=5).attribution_jobs


def test_dead_jobs_and_releases_come_in_pages_that_neither_skip_nor_repeat(
    channel: Any, served: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = rpc.OperatorServiceStub(channel)
    for number in range(2, 6):
        served.registry.register(manifest(f"r{number}"), tmp_path / f"r{number}")
    dead = [dead_ranking_job(served.store) for _ in range(5)]

    def pages(call: Any, request: Any, field: str) -> list[list[str]]:
        found = []
        while not found or request.page_token:
            page = call(request, timeout=20)
            found.append([one.name for one in getattr(page, field)])
            request.page_token = page.next_page_token
        return found

    releases = pages(stub.ListReleases, wire.ListReleasesRequest(parent=f"models/{MODEL}", page_size=2), "releases")
    assert [[name.rpartition("/")[2] for name in page] for page in releases] == [["r5", "r4"], ["r3", "r2"], ["r1"]]
    listing = wire.ListDeadJobsRequest(parent="projects/-", page_size=2)
    assert pages(stub.ListDeadJobs, listing, "attribution_jobs") == [dead[4:2:-1], dead[2:0:-1], dead[:1]]
    monkeypatch.setattr(operator_servicer, "DEFAULT_RELEASES", 2)
    with Client(served.address) as client:
        known, active = client.releases(MODEL)
    assert [release.id for release in known] == ["r5", "r4", "r3", "r2", "r1"] and active is not None
    token = stub.ListReleases(wire.ListReleasesRequest(parent=f"models/{MODEL}", page_size=1), timeout=20)
    with pytest.raises(grpc.RpcError) as caught:
        stub.ListDeadJobs(wire.ListDeadJobsRequest(parent="projects/-", page_token=token.next_page_token), timeout=20)
    assert reason(caught.value) == "PAGE_TOKEN_INVALID"


def test_a_withdrawn_item_does_not_exist_for_callers(channel: Any) -> None:
    stub = catalog_rpc.CatalogServiceStub(channel)
    name = f"corpora/{MODEL}/items/{ITEMS[0]}"
    assert stub.GetItemImage(catalog.GetItemImageRequest(name=name), timeout=5).data == png("blue")
    withdraw = catalog.WithdrawItemsRequest(parent=f"corpora/{MODEL}", item_ids=[ITEMS[0], 999])
    receipt = stub.WithdrawItems(withdraw, timeout=5)
    assert list(receipt.withdrawn_item_ids) == [ITEMS[0]] and list(receipt.unknown_item_ids) == [999]
    assert list(stub.WithdrawItems(withdraw, timeout=5).already_withdrawn_item_ids) == [ITEMS[0]]
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetItemImage(catalog.GetItemImageRequest(name=name), timeout=5)
    assert reason(caught.value) == "ITEM_NOT_FOUND"
    asked = catalog.BatchGetItemsRequest(parent=f"corpora/{MODEL}", item_ids=[ITEMS[2], ITEMS[0], ITEMS[1]])
    assert [i.item_id for i in stub.BatchGetItems(asked, timeout=5).items] == [ITEMS[2], ITEMS[1]]


def test_an_item_of_another_corpus_is_not_withdrawn_by_accident(channel: Any, served: Running) -> None:
    served.context.catalog.add_corpus("other")
    stub = catalog_rpc.CatalogServiceStub(channel)
    receipt = stub.WithdrawItems(catalog.WithdrawItemsRequest(parent="corpora/other", item_ids=[ITEMS[5]]), timeout=5)
    assert list(receipt.unknown_item_ids) == [ITEMS[5]]
    assert served.context.catalog.withdrawn(MODEL) == frozenset()


def test_models_are_listed_with_their_corpus(channel: Any) -> None:
    (model,) = catalog_rpc.CatalogServiceStub(channel).ListModels(catalog.ListModelsRequest(), timeout=5).models
    assert (model.name, model.corpus, model.revision) == (f"models/{MODEL}", f"corpora/{MODEL}", "rev1")


def test_health_follows_the_server_and_says_not_serving_first_when_it_drains(channel: Any, served: Running) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="attribution.v1.AttributionService"), timeout=20)
    serving = health_pb2.HealthCheckResponse.SERVING
    assert any(message.status == serving for message in watch)
    served.call(served.gateway.health.drain())
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_reflection_names_the_services(channel: Any) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (response,) = stub.ServerReflectionInfo(iter([request]), timeout=5)
    names = {service.name for service in response.list_services_response.service}
    assert {"attribution.v1.AttributionService", "attribution.v1.OperatorService", "grpc.health.v1.Health"} <= names
