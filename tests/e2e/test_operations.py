"""What operators rely on, with every process real: traces through all of them, a drained worker, a restored backup."""

from __future__ import annotations

import json
import shlex
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
from byline.errors import AttemptsExhausted
from byline.jobs import NewJob, Stage
from byline.tracing import Trace

from .conftest import MODEL_ID, PATIENCE_S, ROOT, Cluster, eventually

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


def test_the_callers_trace_is_found_with_every_process_that_ran_the_job(
    cluster: Cluster, collector: Any, picture: Picture, project: str
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

    def exported() -> dict[str, tuple[str, str]] | None:
        spans = collector.spans(caller.trace_id)
        found = {f"{service} {one.name}": (one.span_id.hex(), one.parent_span_id.hex()) for service, one in spans}
        return found if len(found) == 5 else None

    spans = eventually(exported, "the export of the job's spans")
    method = "attribution.v1.AttributionService/CreateAttributionJob"
    assert spans[f"byline-gateway {method}"] == (gateway_span, caller.span_id)
    for worker, stage in (("lookup", "lookup"), ("verification", "verify")):
        assert spans[f"byline-{worker} {stage}"] == (told[worker][1], gateway_span)
        assert spans[f"byline-{worker} wait {stage}"][1] == gateway_span


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


def on_the_page(heading: str) -> list[str]:
    """The lines to copy below a heading of the operating guide, without comments."""
    section = (ROOT / "docs" / "operations.md").read_text().split(f"\n{heading}\n")[1]
    block = section.split("```sh\n")[1].split("```")[0]
    return [line.split("#")[0].strip() for line in block.splitlines()]


def test_the_verbs_of_the_operating_guide_do_what_it_says(cluster: Cluster, picture: Picture, project: str) -> None:
    """Copied from the page, in its order; JOB and WORKER replaced by real ones."""
    store = cluster.jobs

    def dead() -> str:
        new = NewJob(project_id=project, request_id=str(uuid.uuid4()), model_id=MODEL_ID, prompt="dead",
                     image_sha256="0" * 64, max_attempts=1)  # fmt: skip
        job, _ = store.create(new)
        error = AttemptsExhausted("it failed 1 times", stage="lookup", attempts=1).to_json()
        with cluster.engine.begin() as connection:
            dies = "UPDATE jobs SET state = 'FAILED', end_time = now(), error = CAST(:e AS jsonb) WHERE id = :id"
            connection.execute(text(dies), {"id": job.id, "e": json.dumps(error)})
        return f"projects/{project}/attributionJobs/{job.id}"

    (worker,) = [
        one["worker_id"]
        for one in json.loads(byline(cluster, "admin", "workers", "--json"))["workers"]
        if one["worker_id"].endswith(f":{cluster.child_of('lookup')}")
    ]
    store.set_paused(Stage.LOOKUP, True)  # so that there are jobs to look at, and nobody runs them
    with cluster.client(project) as client:
        waiting = client.submit(picture(15)[0], prompt="waits").name
        jobs = {"show": waiting, "cancel": waiting}
        said = {}
        for line in on_the_page("## Night shift: the verbs"):
            words = shlex.split(line)[1:]
            verb = words[2] if words[1] == "jobs" else ""
            if verb in ("retry", "discard"):
                jobs[verb] = dead()
            said[line] = byline(cluster, *({"JOB": jobs.get(verb, ""), "WORKER": worker}.get(w, w) for w in words))
        assert client.get(waiting).state == "CANCELLED"
        assert project in said["byline admin jobs retry JOB"] and "QUEUED" in said["byline admin jobs retry JOB"]
        assert "verify: paused" in said["byline admin pause verify"]
        assert "verify: running" in said["byline admin resume verify"]
        assert said["byline admin drain WORKER --wait 60"].endswith("drained\n")
        assert said["byline admin drain WORKER --undo"].endswith("working\n")
        assert jobs["discard"].rpartition("/")[2] not in byline(cluster, "admin", "jobs", "dead", "--project", project)
    store.set_paused(Stage.LOOKUP, False)


def test_rolling_back_as_the_guide_says_changes_who_answers_and_back(
    cluster: Cluster, picture: Picture, project: str
) -> None:
    active = cluster.registry.active(MODEL_ID)
    assert active is not None
    other = next(one for one in cluster.releases if one != active.release_id)
    byline(cluster, "releases", "activate", other, "--reason", "a new one", "--model", MODEL_ID)
    for line in on_the_page("### Roll back"):
        words = [other if word == "RELEASE" else word for word in shlex.split(line)[1:]]
        byline(cluster, *words)
        if "rollback" in words:
            assert cluster.registry.active(MODEL_ID).release_id == active.release_id
    assert cluster.registry.active(MODEL_ID).release_id == other
    byline(cluster, "releases", "rollback", "--reason", "as it was")
    cluster.serves(active.release_id)
    with cluster.client(project) as client:
        assert active.release_id in client.attribute(picture(3)[0], timeout=PATIENCE_S).release


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
