"""Doorbells: which are due, in whose turn, and that none is lost; pauses, deadlines, depths, dead jobs."""

from __future__ import annotations

import uuid

import pytest
from sqlalchemy import text

from byline.errors import JobNotFound, JobNotRetryable
from byline.jobs import Stage, State, Tier, Verification

AGAIN_S = dict.fromkeys(Stage, 30.0)


def due(store, in_flight=100):
    return [doorbell.job_id for doorbell in store.take_due(dict.fromkeys(Stage, in_flight), AGAIN_S)]


def create(store, new_job, count=1, **fields):
    return [store.create(new_job(**fields))[0].id for _ in range(count)]


def test_a_new_job_is_due_once_and_again_when_its_doorbell_is_forgotten(store, new_job):
    (job_id,) = create(store, new_job)
    assert due(store) == [job_id]
    assert due(store) == []
    assert store.forget_dispatch([job_id]) == 1
    assert due(store) == [job_id]
    assert store.forget_dispatch(None) == 1


def test_a_doorbell_nobody_answered_for_long_is_rung_again(store, new_job, let_pass):
    (job_id,) = create(store, new_job)
    due(store)
    let_pass(job_id, "dispatched_at")
    assert due(store) == [job_id]


def test_jobs_that_run_wait_or_ended_are_not_due(store, new_job, let_pass):
    running, waiting, ended = create(store, new_job, 3)
    store.claim(running, Stage.LOOKUP, "w", 30)
    store.fail(store.claim(waiting, Stage.LOOKUP, "w", 30), JobNotFound("x"), retry=True)
    store.cancel("p", ended)
    assert due(store) == []
    let_pass(waiting, "next_attempt_at")
    assert due(store) == [waiting]


def test_each_project_gets_its_turn_however_long_anothers_backlog_is(store, new_job):
    large = create(store, new_job, 5, project_id="large")
    small = create(store, new_job, 2, project_id="small")
    assert due(store, in_flight=4) == [large[0], small[0], large[1], small[1]]


def test_few_doorbells_are_out_at_a_time_and_they_are_refilled_when_half_are_answered(store, new_job):
    jobs = create(store, new_job, 8)
    assert due(store, in_flight=4) == jobs[:4]
    assert due(store, in_flight=4) == []
    store.claim(jobs[0], Stage.LOOKUP, "w", 30)
    assert due(store, in_flight=4) == []
    store.claim(jobs[1], Stage.LOOKUP, "w", 30)
    assert due(store, in_flight=4) == jobs[4:6]


def test_one_stages_backlog_does_not_hold_up_another_stage(store, new_job):
    create(store, new_job, 5)
    (ranking,) = create(store, new_job, kind="ranking")
    due_now = due(store, in_flight=2)
    assert ranking in due_now
    assert len(due_now) == 3


def test_an_estimate_is_rung_before_a_verification_that_became_due_with_it(store, new_job):
    verified, estimated = (create(store, new_job, tier=tier)[0] for tier in (Tier.VERIFIED, Tier.ESTIMATED))
    for job_id in (verified, estimated):
        store.complete(store.claim(job_id, Stage.LOOKUP, "w", 30), {})
    (ranking,) = create(store, new_job, kind="ranking")
    (fresh,) = create(store, new_job)
    assert due(store) == [fresh, estimated, verified, ranking]


def test_somebody_waits_who_was_rung_long_ago_and_may_run(store, new_job, let_pass):
    (job_id,) = create(store, new_job)
    slow = (Stage.LOOKUP,)
    assert not store.anybody_waits(slow, 1.0), "not rung yet: no worker has refused it"
    due(store)
    assert not store.anybody_waits(slow, 60.0) and store.anybody_waits(slow, 0.0)
    assert not store.anybody_waits((Stage.VERIFY,), 0.0)
    store.set_paused(Stage.LOOKUP, True)
    assert not store.anybody_waits(slow, 0.0)
    store.set_paused(Stage.LOOKUP, False)
    due(store)
    assert store.anybody_waits(slow, 0.0)
    store.claim(job_id, Stage.LOOKUP, "w", 30)
    assert not store.anybody_waits(slow, 0.0)


def test_a_paused_stage_starts_nothing_and_resumes_at_once(store, new_job):
    waiting, out = create(store, new_job, 2)
    store.take_due({Stage.LOOKUP: 1}, AGAIN_S)
    store.set_paused(Stage.LOOKUP, True)
    assert due(store) == []
    assert store.claim(out, Stage.LOOKUP, "w", 30) is None
    assert {depth.stage for depth in store.depths() if depth.paused} == {Stage.LOOKUP}
    store.set_paused(Stage.LOOKUP, False)
    assert sorted(due(store)) == sorted([waiting, out])


def test_a_job_whose_time_is_up_fails_wherever_it_is(store, new_job, let_pass):
    queued, running, cancelling, fine = create(store, new_job, 4)
    for job_id in (running, cancelling):
        store.claim(job_id, Stage.LOOKUP, "w", 30)
    store.cancel("p", cancelling)
    for job_id in (queued, running, cancelling):
        let_pass(job_id, "expire_time")
    states = {job.id: job.state for job in store.expire_jobs()}
    assert states == {queued: State.FAILED, running: State.FAILED, cancelling: State.CANCELLED}
    assert store.find(queued).error["reason"] == "DEADLINE_EXCEEDED"
    assert store.find(fine).state is State.QUEUED


def test_a_best_effort_verification_that_runs_out_of_time_keeps_its_answer(store, new_job, let_pass):
    (job_id,) = create(store, new_job, tier=Tier.VERIFIED, verification=Verification.BEST_EFFORT)
    store.complete(store.claim(job_id, Stage.LOOKUP, "w", 30), {"influences": []})
    let_pass(job_id, "expire_time")
    assert [job.state for job in store.expire_jobs()] == [State.SUCCEEDED]
    assert "verification_error" in store.results(job_id)[Stage.VERIFY].result


def test_depths_count_each_stage(store, new_job):
    jobs = create(store, new_job, 3)
    store.claim(jobs[0], Stage.LOOKUP, "w", 30)
    store.take_due({Stage.LOOKUP: 1}, AGAIN_S)
    depths = {depth.stage: depth for depth in store.depths()}
    assert list(depths) == list(Stage)
    lookup = depths[Stage.LOOKUP]
    assert (lookup.queued, lookup.running, lookup.dispatched) == (2, 1, 1)
    assert lookup.oldest_wait_s > 0
    assert depths[Stage.RANK].queued == 0


def dead_job(store, new_job):
    job, _ = store.create(new_job(max_attempts=1))
    store.fail(store.claim(job.id, Stage.LOOKUP, "w", 30), JobNotFound("x"), retry=True)
    return job.id


def test_retrying_a_dead_job_makes_a_new_one_and_leaves_the_old_one_failed(store, new_job):
    job_id = dead_job(store, new_job)
    again = store.retry_dead(job_id)
    assert again.id != job_id
    assert (again.state, again.payload) == (State.QUEUED, {"retry_of": str(job_id)})
    assert store.retry_dead(job_id).id == again.id
    assert store.find(job_id).state is State.FAILED
    assert store.dead() == []


def test_the_queries_of_a_ranking_job_are_entered_with_it_and_with_the_job_that_retries_it(store, new_job, engine):
    queries = [uuid.uuid4(), uuid.uuid4()]
    payload = {"query_ids": [str(query) for query in queries], "teacher": "abu"}
    job, _ = store.create(new_job(kind="ranking", payload=payload, max_attempts=1))
    store.create(new_job(kind="ranking", payload={"query_ids": ["no uuid"]}))
    store.create(new_job(payload=payload))
    store.fail(store.claim(job.id, Stage.RANK, "w", 30), JobNotFound("x"), retry=True)
    again = store.retry_dead(job.id)
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT job_id, query_id, teacher FROM job_queries")).all()
    assert set(rows) == {(job_id, query, "abu") for job_id in (job.id, again.id) for query in queries}


def test_a_discarded_dead_job_is_listed_no_more(store, new_job):
    kept, discarded = dead_job(store, new_job), dead_job(store, new_job)
    store.discard_dead(discarded)
    assert [job.id for job in store.dead("p")] == [kept]
    assert store.dead("q") == []


def test_only_a_dead_job_can_be_retried(store, new_job):
    (job_id,) = create(store, new_job)
    with pytest.raises(JobNotRetryable):
        store.retry_dead(job_id)
