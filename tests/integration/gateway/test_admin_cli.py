"""Every verb of ``byline admin`` against a real gateway, as a person calls it and as a script reads it."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from byline.cli.app import build_app
from byline.client import Client, operations
from byline.errors import BylineError, DatabaseUnavailable, InvalidRequest, JobNotRetryable, WorkerNotFound
from byline.jobs import NewJob, Stage
from byline.tracing import Trace, parse

from .conftest import MODEL, Running, png

Run = Callable[..., str]


@pytest.fixture
def run(served: Running, database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Run:
    """Call ``byline admin ...`` and give back what it printed; raises what it raised."""
    monkeypatch.setenv("BYLINE_GRPC_ADDRESS", served.address)
    monkeypatch.setenv("BYLINE_DATABASE_URL", database_url)
    monkeypatch.setenv("BYLINE_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("byline.cli.app._configure_logging", lambda: None)

    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(build_app(), ["admin", *arguments])
        if isinstance(result.exception, BylineError):
            raise result.exception
        assert result.exit_code == code, result.output
        return result.output

    return run


def worker(served: Running, worker_id: str = "lookup-7@host:9") -> str:
    with served.context.engine.begin() as connection:
        connection.execute(
            text("INSERT INTO worker_reports (worker_id, service, queue, release_id, pid)"
                 " VALUES (:id, 'workers', 'lookup', 'r1', 9)"), {"id": worker_id}
        )  # fmt: skip
    return worker_id


def dead_job(served: Running, project: str = "default") -> str:
    new = NewJob(project_id=project, request_id=str(uuid.uuid4()), model_id=MODEL, prompt="a cat",
                 image_sha256="0" * 64, max_attempts=1)  # fmt: skip
    job, _ = served.store.create(new)
    claim = served.store.claim(job.id, Stage.LOOKUP, "in-test", 30.0, "r1")
    assert claim is not None
    served.store.fail(claim, DatabaseUnavailable("the disk broke"), retry=True)
    return str(job.id)


def test_queues_and_pauses_are_shown_and_changed(run: Run, served: Running) -> None:
    assert run("pause", "verify").strip() == "verify: paused, 0 queued, 0 running"
    assert "paused" in run("queues")
    stages = {stage["stage"]: stage for stage in json.loads(run("queues", "--json"))["stages"]}
    assert set(stages) == {"lookup", "estimate", "verify", "rank"}
    assert stages["verify"]["paused"] and stages["verify"]["oldest_wait"] is None
    assert json.loads(run("resume", "verify", "--json"))["paused"] is False
    with pytest.raises(InvalidRequest):
        run("pause", "tea")


def test_a_worker_is_drained_waited_for_and_resumed(run: Run, served: Running) -> None:
    name = worker(served)
    assert f"{name}: draining" in run("drain", name, "--reason", "looking at its GPU")
    (told,) = json.loads(run("workers", "--json"))["workers"]
    assert told["draining"] and told["drained_time"] is None and told["release_id"] == "r1"
    with served.context.engine.begin() as connection:  # as the worker does once it holds nothing
        connection.execute(text("UPDATE worker_drains SET drained_at = now() WHERE worker = 'lookup-7@host'"))
    assert f"{name}: drained" in run("drain", name, "--wait", "30")
    assert "drained" in run("workers")
    assert json.loads(run("drain", name, "--undo", "--json"))["draining"] is False
    with pytest.raises(WorkerNotFound, match="byline admin workers"):
        run("drain", "nobody@nowhere:1")


def test_a_worker_whose_child_is_replaced_stays_drained(run: Run, served: Running) -> None:
    run("drain", worker(served, "lookup-7@host:9"))
    worker(served, "lookup-7@host:10")
    assert [one["draining"] for one in json.loads(run("workers", "--json"))["workers"]] == [True, True]


def test_dead_jobs_of_all_projects_are_listed_retried_and_discarded(run: Run, served: Running) -> None:
    mine, theirs, other = dead_job(served), dead_job(served, "curation"), dead_job(served)
    listed = json.loads(run("jobs", "dead", "--json"))["jobs"]
    assert {job["name"].rpartition("/")[2] for job in listed} == {mine, theirs, other}
    assert listed[0]["error"]["reason"] == "ATTEMPTS_EXHAUSTED"
    (fresh,) = json.loads(run("jobs", "retry", mine, "--json"))["jobs"]
    assert fresh["state"] == "QUEUED" and fresh["name"].rpartition("/")[2] != mine
    assert json.loads(run("jobs", "retry", mine, "--json"))["jobs"][0]["name"] == fresh["name"]
    run("jobs", "discard", other)
    assert theirs in run("jobs", "dead") and theirs not in run("jobs", "dead", "--project", "default")
    run("jobs", "retry", "--all")
    assert json.loads(run("jobs", "dead", "--json"))["jobs"] == []
    with pytest.raises(JobNotRetryable):
        run("jobs", "discard", fresh["name"])
    with pytest.raises(InvalidRequest, match="--all"):
        run("jobs", "retry")


def test_retry_all_reaches_every_page_and_one_that_is_refused_keeps_no_other(
    run: Run, served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "_PAGE", 2)
    dead = [dead_job(served) for _ in range(5)]
    assert len(json.loads(run("jobs", "dead", "--limit", "3", "--json"))["jobs"]) == 3
    retry = served.context.jobs.retry_dead

    def refusing(job_id: uuid.UUID) -> Any:
        if str(job_id) == dead[2]:
            raise JobNotRetryable("not this one", job_id=job_id)
        return retry(job_id)

    monkeypatch.setattr(served.context.jobs, "retry_dead", refusing)
    told = run("jobs", "retry", "--all", code=1)
    assert f"{dead[2]}: JOB_NOT_RETRYABLE: not this one" in told
    assert [job["name"].rpartition("/")[2] for job in json.loads(run("jobs", "dead", "--json"))["jobs"]] == [dead[2]]


def test_a_job_is_listed_explained_and_cancelled(run: Run, served: Running) -> None:
    with Client(served.address, "default") as client:
        job = client.submit(png(), "a cat")
    assert job.id in run("jobs", "list", "--state", "QUEUED")
    history = json.loads(run("jobs", "show", job.id, "--json"))
    assert [(e["from_state"], e["to_state"], e["actor"]) for e in history["events"]] == [("", "QUEUED", "client")]
    trace = parse(history["traceparent"])
    assert isinstance(trace, Trace)
    assert f"trace: {trace.trace_id}" in run("jobs", "show", job.id)
    (cancelled,) = json.loads(run("jobs", "cancel", job.id, "--json"))["jobs"]
    assert cancelled["state"] == "CANCELLED"
    assert "QUEUED → CANCELLED" in run("jobs", "show", job.id)


def test_the_commands_that_others_share_are_found_under_admin(run: Run) -> None:
    assert "r1" in run("releases", "list")
    assert json.loads(run("labels", "stats", "--json"))["rankings"] == {}
    assert json.loads(run("status", "--json"))["releases"][0]["release_id"] == "r1"


def test_every_verb_can_be_scripted() -> None:
    """``--json`` everywhere, or a script would have to read tables. What moves files in bulk is no operator's verb."""
    from byline.cli.admin import SHARED
    from byline.cli.app import COMMANDS, load_command

    def leaves(command: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            return [(path, command)]
        return [leaf for name, one in inner.items() for leaf in leaves(one, (*path, name))]

    assert set(SHARED) <= set(COMMANDS)
    found = [leaf for name in ("admin", *SHARED) for leaf in leaves(load_command(name), (name,))]
    assert len(found) >= 40
    lacking = {" ".join(path) for path, one in found if not any("--json" in p.opts for p in one.params)}
    assert lacking <= {"corpus ingest", "labels import", "labels export"}
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", part) for path, _ in found for part in path)
