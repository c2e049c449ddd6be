"""Curation over the API: what is set holds at once and for every process; labels and drift are read as measured."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import insert
from typer.testing import CliRunner

from byline.cli.app import build_app
from byline.cli.show import verdict_line
from byline.client.curation import CurationClient
from byline.db import make_engine, transaction
from byline.db.models import Base
from byline.drift import open_alarm, raise_alarm
from byline.errors import BylineError, InvalidRequest, ModelNotFound
from byline.jobs.model import NewJob
from byline.jobs.states import Kind, Stage, Tier
from byline.rankings.controls import read_control
from byline.rankings.live import recent_queries

from .conftest import MODEL, Running, answer, png

_MEASURES = Base.metadata.tables["label_measures"]
_QUERIES = Base.metadata.tables["queries"]
_RANKINGS = Base.metadata.tables["rankings"]


@pytest.fixture
def client(running: Running) -> Iterator[CurationClient]:
    with CurationClient(running.address) as client:
        yield client


def ranking_job(running: Running) -> uuid.UUID:
    job, _ = running.store.create(NewJob(
        project_id="byline-curation", request_id=str(uuid.uuid4()), model_id=MODEL, prompt="kite", kind=Kind.RANKING,
        tier=Tier.VERIFIED, top_k=1, payload={"query_ids": [str(uuid.uuid4())], "teacher": "abu"},
    ))  # fmt: skip
    return job.id


def test_a_pause_holds_at_once_for_every_worker_and_until_it_is_ended(running: Running, client: CurationClient) -> None:
    job = ranking_job(running)
    paused = client.pause_curation(MODEL, "the GPUs are needed elsewhere")
    assert (paused.paused, paused.reason, paused.open_jobs) == (True, "the GPUs are needed elsewhere", 1)
    assert running.store.claim(job, Stage.RANK, "w", 30.0) is None
    assert not running.store.take_due({Stage.RANK: 4}, {Stage.RANK: 60.0})
    engine = make_engine(running.context.engine.url.render_as_string(hide_password=False))  # another process
    with transaction(engine) as connection:
        assert read_control(connection, MODEL).paused
    engine.dispose()
    assert client.pause_curation(MODEL).paused
    assert not client.resume_curation(MODEL).paused
    assert running.store.claim(job, Stage.RANK, "w", 30.0) is not None


def test_a_budget_changes_only_what_is_named_and_can_go_back(client: CurationClient) -> None:
    before = client.curation(MODEL)
    assert before.queries_per_hour is None and before.gpu_share == 1.0
    changed = client.set_budget(MODEL, {"queries_per_hour": 30, "gpu_share": 0.25})
    assert (changed.queries_per_hour, changed.gpu_share, changed.uniform_share) == (30, 0.25, before.uniform_share)
    again = client.set_budget(MODEL, {"uniform_share": 0.0}, reset=["queries_per_hour"])
    assert (again.queries_per_hour, again.gpu_share, again.uniform_share) == (None, 0.25, 0.0)


@pytest.mark.parametrize(
    ("changes", "reset"),
    [({"gpu_share": 1.5}, ()), ({"queries_per_hour": -1}, ()), ({"drift_share": float("nan")}, ()), ({}, ()),
     ({}, ("paused",)), ({"gpu_share": 0.5}, ("gpu_share",))],
)  # fmt: skip
def test_a_budget_that_makes_no_sense_is_refused(
    client: CurationClient, changes: dict[str, float], reset: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidRequest):
        client.set_budget(MODEL, changes, reset)
    assert client.curation(MODEL).gpu_share == 1.0


def test_a_model_that_nobody_registered_is_not_found(client: CurationClient) -> None:
    for call in (client.curation, client.pause_curation, client.label_statistics, client.drift):
        with pytest.raises(ModelNotFound):
            call("another")


def measured(running: Running, kind: str, purpose: str, at: datetime, overlap: float, cluster: int | None = None,
             lost: float | None = None) -> None:
    query, ranking = uuid.uuid4(), uuid.uuid4()
    with transaction(running.context.engine) as connection:
        connection.execute(insert(_QUERIES).values(
            id=query, model_id=MODEL, prompt=f"kite {query}", seed=0, split="train", near_duplicate_group=1,
            image_sha256="0" * 64, source="live",
        ))  # fmt: skip
        connection.execute(insert(_RANKINGS).values(
            id=ranking, query_id=query, model_id=MODEL, teacher_id="t/1", n=0, item_ids=b"", tau=b"", draws=1,
            candidate_set="repeat-4" if kind == "repeat" else "nearest-4", standard_error=b"",
        ))  # fmt: skip
        connection.execute(insert(_MEASURES).values(
            ranking_id=ranking, model_id=MODEL, query_id=query, kind=kind, purpose=purpose, n=40, k=20,
            overlap=overlap, spearman=0.5, predicted=0.5, observed=0.25, lost=lost, missed=lost, at=at, cluster=cluster,
        ))  # fmt: skip


def test_drift_comes_by_window_and_cluster_with_intervals_and_alarms_are_closed_once(
    running: Running, client: CurationClient
) -> None:
    now = datetime.now(UTC)
    for number in range(6):
        measured(running, "student", "drift", now, 0.5 + 0.02 * number, cluster=number % 2)
    measured(running, "student", "uniform", now, 0.9)
    drift = client.drift(MODEL, timedelta(days=2), 3)
    everything, *clusters = drift.windows
    assert (everything.cluster, everything.queries) == (None, 6)
    assert [one.cluster for one in clusters] == [0, 1]
    overlap = everything.overlap
    assert overlap.low is not None and overlap.high is not None and overlap.value == pytest.approx(0.55)
    assert overlap.low < 0.55 < overlap.high
    assert everything.calibration.value == pytest.approx(0.25)
    assert client.drift(MODEL, timedelta(days=2), curated=True).windows[0].overlap.value == pytest.approx(0.9)
    with transaction(running.context.engine) as connection:
        assert raise_alarm(connection, MODEL, "it fell", {}) and not raise_alarm(connection, MODEL, "again", {})
    [alarm] = client.drift(MODEL).alarms
    assert alarm.closed is None and alarm.reason == "it fell"
    closed = client.close_alarm(MODEL, alarm.id, "looked at it")
    assert closed.closed is not None and closed.closed_by == "local: looked at it"
    assert client.close_alarm(MODEL, alarm.id, "again").closed_by == closed.closed_by
    with transaction(running.context.engine) as connection:
        assert open_alarm(connection, MODEL) is None
    with pytest.raises(InvalidRequest):
        client.close_alarm(MODEL, 999_999)


def test_label_statistics_count_labels_and_show_reliability_and_pruning(
    running: Running, client: CurationClient
) -> None:
    now = datetime.now(UTC)
    for overlap in (0.8, 0.9):
        measured(running, "repeat", "uniform", now, overlap)
    measured(running, "student", "uniform", now, 0.5, lost=0.1)
    measured(running, "student", "far", now, 0.5, lost=0.9)
    found = client.label_statistics(MODEL)
    assert found.by_split == {"train": 4} and found.by_source == {"live": 4} and found.by_teacher == {"t/1": 2}
    assert found.repeat_overlap.value == pytest.approx(0.85) and found.repeat_overlap.queries == 2
    # A query chosen for being far says nothing about all of them.
    assert found.pruning_loss.value == pytest.approx(0.1) and found.pruning_loss.queries == 1


def test_consent_travels_with_a_job_and_distance_with_its_answer(served: Running) -> None:
    with CurationClient(served.address) as client:
        jobs = [client.submit(png(), f"kite {consent}", labelling_consent=consent) for consent in (True, False)]
        for job, distance in zip(jobs, (0.9, 0.1), strict=True):
            claim = served.store.claim(uuid.UUID(job.id), Stage.LOOKUP, "w", 30.0, "r1")
            assert claim is not None
            found = answer(claim) | {"labelled_distance": distance, "labelled_distance_limit": 0.5}
            served.store.complete(claim, found)
        answers = [client.get(job).answer for job in jobs]
        far = [one is not None and one.far_from_labelled for one in answers]
        assert far == [True, False] and answers[0] is not None and answers[0].labelled_distance == 0.9
        assert "FAR from every query" in verdict_line(answers[0])
    with transaction(served.context.engine) as connection:
        assert [query.prompt for query in recent_queries(connection, MODEL, 10)] == ["kite True"]


@pytest.fixture
def run(running: Running, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Call ``byline ...`` and give back what it printed; raises what it raised."""
    monkeypatch.setenv("BYLINE_GRPC_ADDRESS", running.address)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("byline.cli.app._configure_logging", lambda: None)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(build_app(), list(arguments))
        if isinstance(result.exception, BylineError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    return run


def test_the_command_line_pauses_resumes_and_spends(run: Callable[..., str]) -> None:
    assert "paused (night)" in run("curation", "pause", "--reason", "night")
    assert json.loads(run("curation", "status", "--json"))["paused"] is True
    assert "running" in run("curation", "resume")
    spent = json.loads(run("curation", "budget", "--queries-per-hour", "12", "--gpu-share", "0.5", "--json"))
    assert (spent["queries_per_hour"], spent["gpu_share"]) == (12, 0.5)
    assert "queries an hour: 12" in run("curation", "status")
    assert json.loads(run("curation", "budget", "--reset", "queries-per-hour", "--json"))["queries_per_hour"] is None
    with pytest.raises(InvalidRequest):
        run("curation", "budget")


def test_the_command_line_shows_drift_and_labels_and_closes_an_alarm(
    running: Running, run: Callable[..., str]
) -> None:
    assert "nothing measured yet" in run("drift")
    now = datetime.now(UTC)
    measured(running, "student", "drift", now, 0.5)
    measured(running, "repeat", "uniform", now, 0.75)
    with transaction(running.context.engine) as connection:
        raise_alarm(connection, MODEL, "it fell", {})
        alarm = open_alarm(connection, MODEL)
    assert alarm is not None
    assert "0.500" in run("drift", "--hours", "48") and "open: it fell" in run("drift")
    assert json.loads(run("drift", "--json"))["windows"][0]["overlap"]["low"] is None  # of one query nothing is sure
    assert "is closed by local: seen" in run("drift", "--close", str(alarm.id), "--reason", "seen")
    assert "train 2" in run("labels", "quality")
    assert json.loads(run("labels", "quality", "--json"))["repeat_overlap"]["value"] == 0.75


def test_the_status_says_that_the_limit_of_rankings_is_why_nothing_is_asked(
    running: Running, run: Callable[..., str]
) -> None:
    measured(running, "student", "uniform", datetime.now(UTC), 0.9)
    limits = running.context.limits
    for most, said in ((0, "rankings: 1\n"), (2, "rankings: 1 of at most 2\n"), (1, "NOTHING IS ASKED")):
        object.__setattr__(running.context, "limits", replace(limits, max_rankings=most))
        assert said in run("curation", "status", "--model", MODEL)
    object.__setattr__(running.context, "limits", limits)
