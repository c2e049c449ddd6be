"""Claims, fences and leases: what a worker may change, and what a worker that lost its lease may not."""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import text

from byline.errors import BylineError, IllegalTransition, InvalidRequest, ItemWithdrawn, LeaseLost
from byline.jobs import Kind, Stage, State, Tier, Verification

RESULT = {"tier": "RETRIEVED", "influences": []}


def claimed(store, new_job, worker="w", stage=Stage.LOOKUP, **fields):
    job, _ = store.create(new_job(**fields))
    claim = store.claim(job.id, stage, worker, 30, "release-1")
    assert claim is not None
    return claim


def test_of_many_workers_with_the_same_doorbell_one_gets_the_job(store, new_job):
    job, _ = store.create(new_job())
    barrier = threading.Barrier(8)

    def claim(number: int):
        barrier.wait(10)
        return store.claim(job.id, Stage.LOOKUP, f"w{number}", 30)

    with ThreadPoolExecutor(8) as pool:
        claims = [claim for claim in pool.map(claim, range(8)) if claim]
    assert len(claims) == 1
    assert store.find(job.id).fence == claims[0].fence == 1


def test_a_claim_pins_the_release_and_later_claims_keep_it(store, new_job):
    claim = claimed(store, new_job, tier=Tier.VERIFIED)
    store.complete(claim, RESULT)
    second = store.claim(claim.job.id, Stage.VERIFY, "v", 30, "release-2")
    assert second.job.release_id == "release-1"
    assert store.results(claim.job.id)[Stage.LOOKUP].release_id == "release-1"


@pytest.mark.parametrize("state", ["ended", "cancelled", "other stage", "unknown", "not due", "out of time"])
def test_there_is_nothing_to_claim_when(state, store, new_job, let_pass):
    job, _ = store.create(new_job())
    stage, job_id = Stage.LOOKUP, job.id
    if state == "ended":
        store.complete(store.claim(job.id, stage, "w", 30), RESULT)
    elif state == "cancelled":
        store.cancel("p", job.id)
    elif state == "other stage":
        stage = Stage.VERIFY
    elif state == "unknown":
        job_id = uuid.uuid4()
    elif state == "not due":
        store.fail(store.claim(job.id, stage, "w", 30), BylineError("x"), retry=True)
    else:
        let_pass(job.id, "expire_time")
    assert store.claim(job_id, stage, "w", 30) is None


def test_a_completed_retrieved_job_has_succeeded_once_with_its_result(store, new_job):
    claim = claimed(store, new_job)
    job = store.complete(claim, RESULT)
    assert (job.state, job.lease_owner, job.lease_until) == (State.SUCCEEDED, None, None)
    assert job.end_time is not None
    result = store.results(job.id)[Stage.LOOKUP]
    assert (result.result, result.fence, result.release_id) == (RESULT, 1, "release-1")
    states = [event.to_state for event in store.events(job.id)]
    assert states == [State.QUEUED, State.RUNNING, State.SUCCEEDED]


def test_a_verified_job_goes_on_to_its_next_stage_with_fresh_attempts(store, new_job):
    claim = claimed(store, new_job, tier=Tier.VERIFIED)
    job = store.complete(claim, RESULT)
    assert (job.state, job.stage, job.attempt, job.dispatched_at) == (State.QUEUED, Stage.VERIFY, 0, None)
    second = store.claim(job.id, Stage.VERIFY, "v", 30)
    assert second.fence == 2
    assert store.complete(second, {"tier": "VERIFIED"}).state is State.SUCCEEDED
    assert set(store.results(job.id)) == {Stage.LOOKUP, Stage.VERIFY}


def test_rows_written_with_a_completion_appear_with_it_or_not_at_all(store, new_job, engine):
    claim = claimed(store, new_job, kind=Kind.RANKING, stage=Stage.RANK)

    def also(connection):
        connection.execute(text("INSERT INTO corpora (id) VALUES ('written')"))
        raise ItemWithdrawn("an item was withdrawn")

    with pytest.raises(ItemWithdrawn):
        store.complete(claim, RESULT, also)
    with engine.begin() as connection:
        assert connection.execute(text("SELECT count(*) FROM corpora")).scalar() == 0
    assert store.find(claim.job.id).state is State.RUNNING
    assert store.results(claim.job.id) == {}


def test_a_repeated_completion_whose_answer_was_lost_changes_nothing(store, new_job):
    claim = claimed(store, new_job, tier=Tier.VERIFIED)
    first = store.complete(claim, RESULT)
    again = store.complete(claim, {"other": True})
    assert again == first
    assert store.results(claim.job.id)[Stage.LOOKUP].result == RESULT


def zombie_writes(store, claim):
    return {
        "heartbeat": lambda: store.heartbeat(claim, 1, 2, 30),
        "complete": lambda: store.complete(claim, {"zombie": True}),
        "fail": lambda: store.fail(claim, BylineError("x"), retry=True),
        "fail for good": lambda: store.fail(claim, BylineError("x"), retry=False),
        "release": lambda: store.release(claim),
        "acknowledge_cancel": lambda: store.acknowledge_cancel(claim),
    }


ZOMBIE_WRITES = ["heartbeat", "complete", "fail", "fail for good", "release", "acknowledge_cancel"]


@pytest.mark.parametrize("write", ZOMBIE_WRITES)
@pytest.mark.parametrize("loss", ["taken over", "taken back", "taken back and claimed", "cancelled", "timed out"])
def test_a_worker_that_lost_its_lease_changes_nothing(loss, write, store, new_job, let_pass):
    zombie = claimed(store, new_job, worker="zombie")
    job_id = zombie.job.id
    let_pass(job_id, "lease_until")
    if loss == "taken over":
        assert store.claim(job_id, Stage.LOOKUP, "other", 30)
    elif loss == "timed out":
        let_pass(job_id, "expire_time")
        store.expire_jobs()
    else:
        if loss == "cancelled":
            store.cancel("p", job_id)
        store.expire_leases()
        if loss == "taken back and claimed":
            let_pass(job_id, "next_attempt_at")
            assert store.claim(job_id, Stage.LOOKUP, "other", 30)
    before, events = store.find(job_id), store.events(job_id)
    with pytest.raises(LeaseLost):
        zombie_writes(store, zombie)[write]()
    assert store.find(job_id) == before
    assert store.events(job_id) == events
    assert store.results(job_id) == {}


def test_the_worker_that_took_over_completes_and_the_zombie_does_not(store, new_job, let_pass):
    zombie = claimed(store, new_job, worker="zombie")
    let_pass(zombie.job.id, "lease_until")
    successor = store.claim(zombie.job.id, Stage.LOOKUP, "successor", 30)
    store.complete(successor, {"by": "successor"})
    with pytest.raises(LeaseLost):
        store.complete(zombie, {"by": "zombie"})
    assert store.results(zombie.job.id)[Stage.LOOKUP].result == {"by": "successor"}


def test_a_late_worker_whose_lease_nobody_took_may_still_complete(store, new_job, let_pass):
    claim = claimed(store, new_job)
    let_pass(claim.job.id, "lease_until")
    assert store.complete(claim, RESULT).state is State.SUCCEEDED


def test_a_heartbeat_extends_the_lease_and_reports_progress(store, new_job, let_pass):
    claim = claimed(store, new_job)
    let_pass(claim.job.id, "lease_until")
    assert store.heartbeat(claim, 3, 10, 30) is False
    job = store.find(claim.job.id)
    assert job.lease_until > job.update_time
    assert (job.progress_done, job.progress_total) == (3, 10)
    assert store.expire_leases() == []


def test_a_heartbeat_without_news_does_not_wake_watchers(store, new_job):
    claim = claimed(store, new_job)
    store.heartbeat(claim, 3, 10, 30)
    revision = store.find(claim.job.id).revision
    store.heartbeat(claim, 3, 10, 30)
    assert store.find(claim.job.id).revision == revision
    store.heartbeat(claim, 4, 10, 30)
    assert store.find(claim.job.id).revision == revision + 1


def test_a_failure_worth_a_retry_waits_before_its_next_attempt(store, new_job, let_pass):
    claim = claimed(store, new_job)
    job = store.fail(claim, BylineError("x"), retry=True)
    assert (job.state, job.attempt, job.dispatched_at) == (State.QUEUED, 1, None)
    assert 0.4 < (job.next_attempt_at - job.update_time).total_seconds() <= 1.0
    let_pass(job.id, "next_attempt_at")
    assert store.claim(job.id, Stage.LOOKUP, "w", 30).job.attempt == 2


def test_a_withdrawal_is_retried_at_once(store, new_job):
    job = store.fail(claimed(store, new_job), ItemWithdrawn("again"), retry=True)
    assert job.next_attempt_at is None
    assert store.claim(job.id, Stage.LOOKUP, "w", 30)


def test_a_failure_for_good_ends_the_job_with_its_error(store, new_job):
    job = store.fail(claimed(store, new_job), InvalidRequest("image", "broken"), retry=False)
    assert job.state is State.FAILED
    assert job.error["reason"] == "INVALID_REQUEST"
    assert store.dead() == []


def test_a_job_that_fails_every_time_ends_dead_after_its_last_attempt(store, new_job, let_pass):
    job, _ = store.create(new_job(max_attempts=2))
    for _ in range(2):
        let_pass(job.id, "next_attempt_at")
        ended = store.fail(store.claim(job.id, Stage.LOOKUP, "w", 30), BylineError("boom"), retry=True)
    assert ended.state is State.FAILED
    assert ended.error["reason"] == "ATTEMPTS_EXHAUSTED"
    assert ended.error["metadata"] == {"stage": "lookup", "attempts": "2", "last_reason": "INTERNAL"}
    assert [dead.id for dead in store.dead()] == [job.id]


def test_a_job_that_kills_every_worker_ends_dead_too(store, new_job, let_pass):
    """The attempt is counted at the claim: a worker that dies without a word has used it."""
    job, _ = store.create(new_job(max_attempts=3))
    for attempt in range(1, 4):
        let_pass(job.id, "next_attempt_at")
        assert store.claim(job.id, Stage.LOOKUP, f"victim-{attempt}", 30).job.attempt == attempt
        let_pass(job.id, "lease_until")
        (changed,) = store.expire_leases()
    assert changed.state is State.FAILED
    assert changed.error["metadata"]["last_reason"] == "LEASE_EXPIRED"
    assert store.claim(job.id, Stage.LOOKUP, "w", 30) is None


def test_an_expired_lease_cannot_be_taken_over_after_the_last_attempt(store, new_job, let_pass):
    claim = claimed(store, new_job, max_attempts=1)
    let_pass(claim.job.id, "lease_until")
    assert store.claim(claim.job.id, Stage.LOOKUP, "other", 30) is None


def test_a_failed_best_effort_verification_leaves_the_retrieved_answer(store, new_job):
    claim = claimed(store, new_job, tier=Tier.VERIFIED, verification=Verification.BEST_EFFORT)
    store.complete(claim, RESULT)
    job = store.fail(store.claim(claim.job.id, Stage.VERIFY, "v", 30), BylineError("no GPU"), retry=False)
    assert (job.state, job.error) == (State.SUCCEEDED, None)
    results = store.results(job.id)
    assert results[Stage.LOOKUP].result == RESULT
    assert results[Stage.VERIFY].result["verification_error"]["message"] == "no GPU"


@pytest.mark.parametrize("late", ["w", "another with the same fence"])
def test_a_worker_that_is_late_for_a_best_effort_verification_takes_no_others_end_for_its_own(
    late, store, new_job, let_pass
):
    claim = claimed(store, new_job, tier=Tier.VERIFIED, verification=Verification.BEST_EFFORT)
    job_id = store.complete(claim, RESULT).id
    verify = store.claim(job_id, Stage.VERIFY, "w", 30, "release-1")
    if late == "w":
        let_pass(job_id, "expire_time")
        assert [job.state for job in store.expire_jobs()] == [State.SUCCEEDED]
    else:  # after a crash of Postgres that forgot a claim
        store.complete(verify, {"tier": "VERIFIED", "influences": []})
        verify = replace(verify, worker_id=late)
    ended = store.results(job_id)[Stage.VERIFY].result
    with pytest.raises(LeaseLost):
        store.complete(verify, {"zombie": True})
    assert store.results(job_id)[Stage.VERIFY].result == ended and store.find(job_id).state is State.SUCCEEDED


def test_a_failed_required_verification_fails_the_job(store, new_job):
    claim = claimed(store, new_job, tier=Tier.VERIFIED)
    store.complete(claim, RESULT)
    job = store.fail(store.claim(claim.job.id, Stage.VERIFY, "v", 30), BylineError("no GPU"), retry=False)
    assert job.state is State.FAILED
    assert set(store.results(job.id)) == {Stage.LOOKUP}


def test_a_failed_best_effort_lookup_fails_the_job(store, new_job):
    claim = claimed(store, new_job, tier=Tier.VERIFIED, verification=Verification.BEST_EFFORT)
    assert store.fail(claim, BylineError("x"), retry=False).state is State.FAILED


def test_a_job_given_back_is_due_at_once_and_keeps_its_attempts(store, new_job):
    claim = claimed(store, new_job)
    job = store.release(claim)
    assert (job.state, job.attempt, job.next_attempt_at) == (State.QUEUED, 0, None)
    assert store.claim(job.id, Stage.LOOKUP, "w", 30).fence == 2


def test_a_cancel_cannot_be_acknowledged_that_nobody_asked_for(store, new_job):
    with pytest.raises(IllegalTransition):
        store.acknowledge_cancel(claimed(store, new_job))
