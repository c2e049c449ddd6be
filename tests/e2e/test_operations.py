"""What operators rely on, with every process real: traces through all of them, a drained worker, a restored backup."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from attribution.v1 import attribution_job_pb2 as job_wire
from attribution.v1 import attribution_service_pb2 as wire
from attribution.v1 import attribution_service_pb2_grpc as rpc
from byline.catalog.items import Item
from byline.cli.app import build_app
from byline.tracing import Trace

from .conftest import PATIENCE_S, Cluster, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(3600)]

Picture = Callable[[int], tuple[bytes, Item]]


def byline(cluster: Cluster, *arguments: str, expected: int = 0) -> str:
    """What a command of ``byline`` printed. In this process: a dozen starts of Python would take longer than it all."""
    ours = {name: value for name, value in cluster.environment.items() if name.startswith("BYLINE_")}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("byline.cli.app._configure_logging", lambda: None)
        result = CliRunner().invoke(build_app(), list(arguments), env=ours)
    assert result.exit_code == expected, result.output + str(result.exception or "")
    return result.output


def lines_of(cluster: Cluster, name: str, trace_id: str) -> list[dict[str, Any]]:
    found = []
    for line in (cluster.root / f"{name}.log").read_text(errors="replace").splitlines():
        if trace_id in line:
            found.append(json.loads(line))
    return found


def test_the_callers_trace_is_found_in_the_log_of_every_worker_that_ran_the_job(
    cluster: Cluster, picture: Picture, project: str
) -> None:
    caller = Trace(uuid.uuid4().hex, uuid.uuid4().hex[:16])
    data, item = picture(11)
    request = wire.CreateAttributionJobRequest(
        parent=f"projects/{project}", request_id=str(uuid.uuid4()),
        attribution_job=job_wire.AttributionJob(
            query=job_wire.Query(prompt=item.caption, inline_image=data),
            options=job_wire.JobOptions(tier=job_wire.TIER_VERIFIED, top_k=3),
        ),
    )  # fmt: skip
    with grpc.insecure_channel(cluster.address) as channel:
        stub = rpc.AttributionServiceStub(channel)
        name = stub.CreateAttributionJob(request, metadata=[("traceparent", str(caller))], timeout=PATIENCE_S).name
    with cluster.client(project) as client:
        assert list(client.watch(name, timeout=PATIENCE_S))[-1].state == "SUCCEEDED"

    def ends(worker: str) -> list[dict[str, Any]]:
        return [line for line in lines_of(cluster, worker, caller.trace_id) if line["event"] == "stage_ended"]

    told = {}
    for worker, stage in (("lookup", "lookup"), ("verification", "verify")):
        (ended,) = eventually(lambda worker=worker: ends(worker), f"the line of {worker}")
        assert (ended["job_id"], ended["stage"]) == (name.rpartition("/")[2], stage)
        assert ended["attempt"] == 1 and ended["release_id"] and ended["project_id"] == project
        assert ended["waited_s"] >= 0 and ended["seconds"] > 0
        assert item.caption not in json.dumps(lines_of(cluster, worker, caller.trace_id))
        told[worker] = ended["parent_span_id"], ended["span_id"]
    gateway_span = told["lookup"][0]
    assert gateway_span == told["verification"][0] != caller.span_id  # the gateway's span, a child of the caller's
    assert told["lookup"][1] != told["verification"][1]
    history = json.loads(byline(cluster, "admin", "jobs", "show", name, "--json"))
    assert history["traceparent"].split("-")[1:3] == [caller.trace_id, gateway_span]


def test_a_drained_lookup_worker_claims_nothing_until_it_is_resumed(
    cluster: Cluster, picture: Picture, project: str
) -> None:
    (worker,) = [
        one["worker_id"]
        for one in json.loads(byline(cluster, "admin", "workers", "--json"))["workers"]
        if one["queue"] == "lookup" and one["worker_id"].endswith(f":{cluster.child_of('lookup')}")
    ]
    drained = json.loads(byline(cluster, "admin", "drain", worker, "--wait", str(PATIENCE_S), "--json"))
    assert drained["draining"] and drained["drained_time"]
    data, item = picture(12)
    with cluster.client(project) as client:
        job = client.submit(data, prompt=item.caption)
        assert "draining" in byline(cluster, "admin", "workers") or "drained" in byline(cluster, "admin", "workers")
        assert client.get(job).state == "QUEUED"
        byline(cluster, "admin", "drain", worker, "--undo")
        assert list(client.watch(job, timeout=PATIENCE_S))[-1].state == "SUCCEEDED"


def test_after_dump_wipe_and_restore_everything_answers(
    cluster: Cluster, picture: Picture, project: str, tmp_path: Path
) -> None:
    data, item = picture(13)
    with cluster.client(project) as client:
        before = client.attribute(data, prompt=item.caption, top_k=5, timeout=PATIENCE_S)
        byline(cluster, "backup", "create", str(tmp_path / "backup"))
        lost = client.attribute(picture(14)[0], prompt="made after the backup", timeout=PATIENCE_S).job

        cluster.stop("lookup")
        cluster.stop("dispatcher")
        with cluster.engine.begin() as connection:
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
        for folder in ("blobs", "releases"):
            shutil.rmtree(cluster.root / folder)
        cluster.valkey.stop()
        shutil.rmtree(cluster.root / "valkey" / "appendonlydir", ignore_errors=True)
        cluster.valkey.start()
        byline(cluster, "backup", "verify", str(tmp_path / "backup"))
        byline(cluster, "backup", "restore", str(tmp_path / "backup"))
        cluster.start("dispatcher")
        cluster.start("lookup")
        cluster.ready("lookup")

        again = client.get(before.job)
        assert again.state == "SUCCEEDED" and again.answers == before.job.answers
        assert client.query_image(before.job) == data
        assert lost.id not in {job.id for job in client.list(limit=1000)}
        after = client.attribute(data, prompt=item.caption, top_k=5, timeout=PATIENCE_S)
        assert [one.item_id for one in after.influences] == [one.item_id for one in before.influences]
        verified = client.attribute(data, prompt=item.caption, tier="VERIFIED", top_k=3, timeout=PATIENCE_S)
        assert verified.tier == "VERIFIED"
    # 1: this server runs without flushing, to be quick. Whatever else it finds would be the restore's fault.
    findings = byline(cluster, "doctor", "--json", expected=1)
    bad = {one["check"] for one in json.loads(findings)["findings"] if one["level"] == "failure"}
    assert bad <= {"postgres.fsync", "postgres.full_page_writes", "postgres.synchronous_commit"}, findings
