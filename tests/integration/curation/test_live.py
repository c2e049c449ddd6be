"""Jobs of clients that opted in become labels and drift samples, once each; every ranking is measured once."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine, select, text, update

from byline.catalog.blobs import BlobStore
from byline.db.session import transaction
from byline.drift import open_alarm
from byline.drift.report import SAMPLES_DROPPED
from byline.jobs.outbox import expire_jobs
from byline.jobs.states import Stage, Tier
from byline.jobs.store import JobStore
from byline.rankings.controls import CurationControl, allowance, set_paused, spent
from byline.rankings.curated import add_choice, labels_made, measured_rows, reliability_rows, repeatable
from byline.rankings.labelled import load_splits
from byline.rankings.store import RankingStore
from services.curation.loop import Curator
from services.curation.plan import PlannedQuery
from services.curation.produce import Labelling
from services.curation.prompts import live_seed

from .conftest import (
    EXACT,
    LINEAR,
    MODEL,
    TABLES,
    PerfectHead,
    ask,
    count,
    intake,
    labelled,
    measurer,
    producer,
    rank_all,
)


def test_only_jobs_of_clients_that_opted_in_are_looked_at_and_each_once(engine: Engine, blobs: BlobStore) -> None:
    for consent in (True, False):
        ask(engine, blobs, f"kite {consent}", consent=consent)
        ask(engine, blobs, f"verified {consent}", consent=consent, tier=Tier.VERIFIED)
    taking, everything = intake(engine, blobs), CurationControl(drift_share=1.0)
    assert (taking.step(everything), taking.step(everything)) == (1, 0)
    [label] = RankingStore(engine).load(MODEL, EXACT)
    assert label.prompt == "verified True" and label.source == "live" and len(label.item_ids) == 8
    samples = taking.samples(10, frozenset({("verified True", live_seed(label.image_sha256))}))
    assert [one.prompt for one in samples] == ["kite True"] and samples[0].release_id == "r1"
    assert count(engine, "live_intake", state="void") == 1  # the one that has a label now
    assert {one.prompt for one in taking.possible(10)} == {"kite True", "verified True"}
    with transaction(engine) as connection:
        connection.execute(update(TABLES["live_intake"]).values(at=datetime.now(UTC) - timedelta(days=9)))
    taking.step(CurationControl(drift_share=0.0))
    assert count(engine, "live_intake", state="void") == 0 and count(engine, "live_intake", state="labelled") == 1


def test_a_share_of_the_lookups_is_sampled_the_same_whoever_asks(engine: Engine, blobs: BlobStore) -> None:
    for number in range(60):
        ask(engine, blobs, f"kite {number}")
    taking = intake(engine, blobs)
    taking.step(CurationControl(drift_share=0.3))
    taking.step(CurationControl(drift_share=0.3))
    assert 6 <= count(engine, "live_intake") <= 32
    taking.step(CurationControl(drift_share=0.0))
    taking.step(CurationControl(drift_share=1.0))
    assert count(engine, "live_intake") == 60


def test_a_clients_label_keeps_the_split_of_what_it_repeats_and_names_no_withdrawn_item(
    engine: Engine, blobs: BlobStore
) -> None:
    ask(engine, blobs, "A frozen test-prompt", tier=Tier.VERIFIED)
    ask(engine, blobs, "thing 100!", tier=Tier.VERIFIED)
    assert intake(engine, blobs, frozenset({100})).step(CurationControl()) == 2
    splits = load_splits(RankingStore(engine), MODEL, "abu_plus_linear+output_norm")
    assert [one.prompt for one in splits.train] == ["thing 100!"] and not splits.test and not splits.validation
    assert 100 not in splits.train[0].item_ids and len(splits.train[0].item_ids) == 7


def test_a_sampled_lookup_is_ranked_and_measured_against_the_release_that_answered_it(
    engine: Engine, blobs: BlobStore
) -> None:
    labelled(engine, blobs, ["kite", "boat"])
    now = datetime.now(UTC)
    measuring = measurer(engine, PerfectHead(), now)
    assert (measuring.step(), measuring.step()) == (2, 0)
    with transaction(engine) as connection:
        rows = measured_rows(connection, MODEL, ["drift"], now - timedelta(days=1))
        kept = connection.execute(text("SELECT lost, missed, release_id FROM label_measures")).all()
    assert [row.overlap for row in rows] == [1.0, 1.0] and rows[0].spearman == pytest.approx(1.0)
    assert all(row.release_id == "r1" and row.lost >= 0 and row.missed >= 0 for row in kept)


def test_a_fall_raises_one_alarm_until_somebody_has_dealt_with_it(engine: Engine, blobs: BlobStore) -> None:
    now = datetime.now(UTC)
    labelled(engine, blobs, [f"kite {number}" for number in range(6)])
    measurer(engine, PerfectHead(), now).step()
    with transaction(engine) as connection:  # that was the day before yesterday
        connection.execute(update(TABLES["label_measures"]).values(at=now - timedelta(days=2)))
    labelled(engine, blobs, [f"boat {number}" for number in range(6)])
    fallen = measurer(engine, PerfectHead(flipped=True), now + timedelta(hours=1))
    assert fallen.step() == 6
    for _ in range(2):
        assert fallen.watch()
    with transaction(engine) as connection:
        alarm = open_alarm(connection, MODEL)
        assert alarm is not None and "fell from 1.000" in alarm.reason
        connection.execute(text("UPDATE drift_alarms SET closed_at = now(), closed_by = 'release r2'"))
    assert fallen.watch()  # the fall is still there, but whoever closed it has a window's time
    with transaction(engine) as connection:
        assert open_alarm(connection, MODEL) is None


def test_a_repeat_measures_the_labels_and_is_no_label(engine: Engine, blobs: BlobStore) -> None:
    labelled(engine, blobs, ["kite", "boat"])
    making = producer(engine, blobs)
    with transaction(engine) as connection:
        found = repeatable(connection, MODEL, "abu_plus_linear+output_norm", 10, "draw")
        assert labels_made(connection, MODEL) == (2, 0)
    assert len(found) == 2
    job = making.store.find(making.repeat(found))
    assert job is not None and job.payload["teacher_settings"]["seed"] == Labelling("", 0, {}).repeat_seed
    assert rank_all(engine, noise=0.05) == 1
    assert measurer(engine, PerfectHead(), datetime.now(UTC)).step() == 4
    with transaction(engine) as connection:
        assert labels_made(connection, MODEL) == (2, 2)
        assert repeatable(connection, MODEL, "abu_plus_linear+output_norm", 10, "draw") == []
        reliability = reliability_rows(connection, MODEL)
    assert len(reliability) == 2 and all(0.7 < overlap <= 1.0 for overlap, _ in reliability)
    store = RankingStore(engine)
    assert len(store.load(MODEL, LINEAR)) == 2 and store.teachers(MODEL) == {LINEAR: 2}
    assert sum(store.counts(MODEL).values()) == 2


def test_a_paused_curator_asks_for_nothing_and_a_full_budget_neither(engine: Engine, blobs: BlobStore) -> None:
    making = producer(engine, blobs)
    plan = [PlannedQuery(f"kite {n}", n, n, "train") for n in range(4)]
    for control, allowed in ((CurationControl(paused=True), 8), (CurationControl(), 0)):
        curator = Curator(making, lambda: plan, lambda: 0, lambda: 0, target_open=2, max_rankings=10,
                          control=lambda control=control: control,  # type: ignore[misc]
                          allowance=lambda _control, _count, allowed=allowed: allowed)  # type: ignore[misc]
        assert not curator.tick()
    assert count(engine, "jobs") == 0


def test_the_first_reason_for_a_query_stays(engine: Engine, blobs: BlobStore) -> None:
    making = producer(engine, blobs)
    making.produce([PlannedQuery("kite", 1, 1, "train", chosen_for="far")])
    with transaction(engine) as connection:
        query_id = connection.execute(select(TABLES["queries"].c.id)).scalar_one()
        add_choice(connection, query_id, MODEL, "uniform", None)
    assert count(engine, "query_choices", chosen_for="far") == 1


def test_what_was_spent_is_counted_from_what_workers_did(engine: Engine, blobs: BlobStore) -> None:
    """Claimed 100 s ago and given back after 60 s, claimed again 30 s ago and still running: 90 s of one worker."""
    job_id = producer(engine, blobs).produce([PlannedQuery(f"kite {n}", n, n, "train") for n in range(3)])
    with transaction(engine) as connection:
        for seconds, state in ((100, "RUNNING"), (40, "QUEUED"), (30, "RUNNING")):
            connection.execute(text(
                "INSERT INTO job_events (job_id, at, to_state, stage, actor, fence, reason)"
                " VALUES (:job, now() - make_interval(secs => :seconds), :state, 'rank', 'w', 1, '')"
            ), {"job": job_id, "seconds": seconds, "state": state})  # fmt: skip
        connection.execute(text("DELETE FROM job_events WHERE to_state = 'QUEUED' AND actor = 'client'"))
        connection.execute(text(
            "INSERT INTO worker_reports (worker_id, service, queue, pid)"
            " VALUES ('v', 'workers', 'verification', 1), ('l', 'workers', 'lookup', 1)"
        ))  # fmt: skip
        connection.execute(text("UPDATE jobs SET create_time = now() - interval '200 seconds' WHERE id = :job"),
                           {"job": job_id})  # fmt: skip
        everything = spent(connection, MODEL, timedelta(minutes=10))
        lately = spent(connection, MODEL, timedelta(seconds=80))
    assert (everything.queries, everything.workers) == (3, 1)
    assert everything.worker_seconds == pytest.approx(90, abs=2)
    assert lately.worker_seconds == pytest.approx(70, abs=2)  # the first 20 s were before the window
    assert everything.asked_s == pytest.approx(200, abs=2) and everything.since_asked == pytest.approx(90, abs=2)
    assert allowance(CurationControl(gpu_share=0.4), everything, 8) == 0
    assert allowance(CurationControl(gpu_share=0.5), everything, 8) == 8


def test_a_ranking_that_runs_longer_than_any_window_is_counted_whole(engine: Engine, blobs: BlobStore) -> None:
    """Claimed 25 minutes ago and still running, or ended a minute ago: the window of ten minutes is full, or nearly."""
    job_id = producer(engine, blobs).produce([PlannedQuery("kite", 1, 1, "train")])
    event = text("INSERT INTO job_events (job_id, at, to_state, stage, actor, fence, reason)"
                 " VALUES (:job, now() - make_interval(secs => :seconds), :state, 'rank', 'w', 1, '')")  # fmt: skip
    with transaction(engine) as connection:
        connection.execute(text("DELETE FROM job_events"))
        connection.execute(text("UPDATE jobs SET state = 'RUNNING', create_time = now() - interval '26 minutes'"))
        connection.execute(event, {"job": job_id, "seconds": 1500, "state": "RUNNING"})
        running = spent(connection, MODEL, timedelta(minutes=10))
        connection.execute(text("UPDATE jobs SET state = 'SUCCEEDED'"))
        connection.execute(event, {"job": job_id, "seconds": 60, "state": "SUCCEEDED"})
        ended = spent(connection, MODEL, timedelta(minutes=10))
    assert (running.worker_seconds, running.since_asked) == (pytest.approx(600, abs=2), pytest.approx(1500, abs=2))
    assert (ended.worker_seconds, ended.since_asked) == (pytest.approx(540, abs=2), pytest.approx(1440, abs=2))
    assert allowance(CurationControl(gpu_share=0.25), ended, 8) == 0


def test_a_pause_while_pictures_are_generated_leaves_no_ranking_that_is_due(engine: Engine, blobs: BlobStore) -> None:
    def generate(planned: PlannedQuery) -> bytes:
        with transaction(engine) as connection:
            set_paused(connection, MODEL, True, "now")
        return planned.prompt.encode()

    making = replace(producer(engine, blobs), generate=generate)
    job = making.produce([PlannedQuery("kite", 1, 1, "train")])
    store = JobStore(engine, {})
    assert store.claim(job, Stage.RANK, "w", 30.0) is None
    assert not store.take_due({Stage.RANK: 4}, {Stage.RANK: 60.0})
    with transaction(engine) as connection:
        set_paused(connection, MODEL, False, "")
    assert store.claim(job, Stage.RANK, "w", 30.0) is not None


def test_a_ranking_that_was_held_for_a_year_has_not_failed(engine: Engine, blobs: BlobStore) -> None:
    job = producer(engine, blobs).produce([PlannedQuery("kite", 1, 1, "train")])
    with transaction(engine) as connection:
        set_paused(connection, MODEL, True, "the GPUs are sold")
        connection.execute(text(
            "UPDATE jobs SET create_time = create_time - interval '1 year',"
            " expire_time = expire_time - interval '1 year'"
        ))  # fmt: skip
        assert expire_jobs(connection, 10) == []
        set_paused(connection, MODEL, False, "")
    assert JobStore(engine, {}).claim(job, Stage.RANK, "w", 30.0) is not None


def test_samples_are_asked_about_newest_first_and_given_up_when_older_than_the_window(
    engine: Engine, blobs: BlobStore
) -> None:
    for number in range(4):
        ask(engine, blobs, f"kite {number}")
    taking, control = intake(engine, blobs), CurationControl(drift_share=1.0)
    taking.step(control)
    ages = {"kite 0": 25, "kite 1": 20, "kite 2": 1, "kite 3": 9}
    with transaction(engine) as connection:
        for prompt, hours in ages.items():
            connection.execute(text("UPDATE live_intake SET at = now() - make_interval(hours => :hours)"
                                    " WHERE prompt = :prompt"), {"hours": hours, "prompt": prompt})  # fmt: skip
    before = SAMPLES_DROPPED.labels(MODEL)._value.get()
    taking.step(control)
    assert [one.prompt for one in taking.samples(2, frozenset())] == ["kite 2", "kite 3"]
    assert count(engine, "live_intake", state="void") == 1 and count(engine, "live_intake", state="waiting") == 3
    assert SAMPLES_DROPPED.labels(MODEL)._value.get() == before + 1
