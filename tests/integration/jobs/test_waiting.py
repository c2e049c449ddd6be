"""Jobs taken several to a claim: the same promises as one by one, on a real Postgres."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import text

from byline.db.listen import ANSWERED, QUEUED, Listener
from byline.errors import InvalidRequest, ItemWithdrawn, LeaseLost
from byline.jobs import Stage, State, Tier, batch, waiting
from byline.jobs.batch import BatchRunner
from byline.jobs.runner import Outcome

RESULT = {"tier": "RETRIEVED", "influences": []}


def take(store, worker="w", most=10):
    return store.claim_waiting(Stage.LOOKUP, worker, 30, "r1", most)


def create(store, new_job, count, **fields):
    return [store.create(new_job(**fields))[0] for _ in range(count)]


def test_several_jobs_are_claimed_at_once_each_with_lease_fence_and_event(store, new_job):
    jobs = create(store, new_job, 3)
    claims = take(store)
    assert [claim.job.id for claim in claims] == [job.id for job in jobs]
    for claim in claims:
        row = store.find(claim.job.id)
        assert (row.state, row.fence, row.attempt, row.release_id) == (State.RUNNING, 1, 1, "r1")
        assert row.lease_owner == "w" and row.lease_until is not None
        assert [event.reason for event in store.events(row.id)] == ["created", "claimed"]


def test_projects_take_turns(store, new_job):
    create(store, new_job, 5, project_id="busy")
    create(store, new_job, 1, project_id="quiet")
    assert sorted(claim.job.project_id for claim in take(store, most=2)) == ["busy", "quiet"]


def test_of_many_workers_each_job_goes_to_one(store, new_job):
    jobs = create(store, new_job, 40)
    barrier = threading.Barrier(4)

    def work(number):
        barrier.wait(10)
        found = []
        while claims := take(store, f"w{number}", 3):
            found += claims
        return found

    with ThreadPoolExecutor(4) as pool:
        claims = [claim for found in pool.map(work, range(4)) for claim in found]
    claims += take(store, most=100)  # what all of them skipped at the same moment
    assert sorted(claim.job.id for claim in claims) == sorted(job.id for job in jobs)


@pytest.mark.parametrize("state", ["tried before", "paused", "cancelled", "out of time", "of another stage"])
def test_a_job_is_not_taken_without_a_doorbell_when_it_is(state, store, new_job, let_pass):
    (job,) = create(store, new_job, 1, tier=Tier.VERIFIED)
    if state == "tried before":
        store.fail(store.claim(job.id, Stage.LOOKUP, "w", 30), ItemWithdrawn("x"), retry=True)
    elif state == "paused":
        store.set_paused(Stage.LOOKUP, True)
    elif state == "cancelled":
        store.cancel("p", job.id)
    elif state == "out of time":
        let_pass(job.id, "expire_time")
    else:
        store.complete(store.claim(job.id, Stage.LOOKUP, "w", 30), RESULT)
    assert take(store) == []


def test_jobs_completed_together_end_once_with_result_and_event(store, new_job):
    create(store, new_job, 3)
    claims = take(store)
    done = [(claim, {**RESULT, "number": n}, []) for n, claim in enumerate(claims)]
    assert store.complete_last(done) == {claim.job.id for claim in claims}
    assert store.complete_last(done) == set()
    for number, claim in enumerate(claims):
        row = store.find(claim.job.id)
        assert (row.state, row.lease_owner) == (State.SUCCEEDED, None) and row.end_time is not None
        result = store.results(row.id)[Stage.LOOKUP]
        assert (result.result["number"], result.release_id, result.fence) == (number, "r1", 1)
        assert [event.to_state for event in store.events(row.id)][-1] is State.SUCCEEDED


def item(engine, item_id, *, withdrawn):
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO corpora (id) VALUES ('c') ON CONFLICT DO NOTHING"))
        connection.execute(text(
            "INSERT INTO items (item_id, corpus_id, caption, image_sha256, near_duplicate_group, withdrawn_at)"
            " VALUES (:id, 'c', '', '', :id, CASE WHEN :withdrawn THEN now() END)"
        ), {"id": item_id, "withdrawn": withdrawn})  # fmt: skip


def test_left_out_of_a_completion_is_who_lost_the_lease_is_cancelled_names_a_withdrawn_item_or_goes_on(
    engine, store, new_job, let_pass
):
    create(store, new_job, 4)
    create(store, new_job, 1, tier=Tier.VERIFIED)
    lost, cancelled, refused, fine, goes_on = claims = take(store)
    let_pass(lost.job.id, "lease_until")
    store.expire_leases()
    store.cancel("p", cancelled.job.id)
    item(engine, 8, withdrawn=False)
    item(engine, 9, withdrawn=True)
    done = [(claim, RESULT, [8, 9] if claim is refused else [7, 8]) for claim in claims]
    assert store.complete_last(done) == {fine.job.id}
    states = [store.find(claim.job.id).state for claim in (lost, cancelled, refused, goes_on)]
    assert states == [State.QUEUED, State.CANCELLING, State.RUNNING, State.RUNNING]
    assert all(store.results(claim.job.id) == {} for claim in (lost, cancelled, refused, goes_on))


def test_the_same_fence_in_other_hands_changes_nothing(store, new_job):
    """Claims are not flushed: after a crash of Postgres that forgot one, the next claim has its fence."""
    create(store, new_job, 2)
    forgotten, other = (replace(claim, worker_id="crashed") for claim in take(store))
    assert store.complete_last([(forgotten, RESULT, []), (other, RESULT, [])]) == set()
    for write in (lambda: store.complete(forgotten, RESULT), lambda: store.heartbeat(forgotten, 0, 0, 30)):
        with pytest.raises(LeaseLost):
            write()
    assert store.find(forgotten.job.id).state is State.RUNNING


def test_a_claim_does_not_wait_for_the_disk_and_a_completion_does(engine, store, new_job):
    def mode(connection):
        return connection.execute(text("SHOW synchronous_commit")).scalar()

    create(store, new_job, 1)
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL synchronous_commit = on"))  # as in production; the tests' server has it off
        claims = waiting.claim_waiting(connection, Stage.LOOKUP, worker_id="w", lease_s=30, release_id="r1", most=1)
        assert mode(connection) == "off"
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL synchronous_commit = on"))
        assert waiting.complete_last(connection, [(claims[0], RESULT, [])])
        assert mode(connection) == "on"


def test_a_job_created_without_flushing_is_flushed_before_a_repeat_of_it_is_acknowledged(engine, store, new_job):
    new = new_job("r")
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL synchronous_commit = on"))
        store.create_within(connection, [new], flush=False)
        assert connection.execute(text("SHOW synchronous_commit")).scalar() == "off"
    before = written(engine)
    _, created = store.create(new)
    assert not created and written(engine) > before  # a commit that wrote nothing would not wait for the disk


def written(engine) -> int:
    """How far the write-ahead log goes, in bytes."""
    with engine.connect() as connection:
        return int(connection.execute(text("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")).scalar())


# --- the runner --------------------------------------------------------------------------------------------


@pytest.fixture
def runner(store):
    return BatchRunner(store, "w", 30.0, time.monotonic, stop=threading.Event())


@pytest.fixture
def quick(runner, monkeypatch):
    """The work of these tests costs nothing: a batch is as large as it may be."""
    monkeypatch.setattr(runner, "_mean_s", 0.0)
    return runner


def test_one_bad_job_costs_its_neighbours_nothing(quick, store, new_job):
    jobs = create(store, new_job, 4)

    def work(claim, beat):
        if claim.job.id == jobs[1].id:
            raise InvalidRequest("query", "is broken")
        if claim.job.id == jobs[2].id:
            return Outcome({"not JSON": object()})
        return Outcome(RESULT)

    assert quick.run_waiting(Stage.LOOKUP, work, "r1") == 4
    states = [store.find(job.id).state for job in jobs]
    assert states[0] is states[3] is State.SUCCEEDED and states[1] is State.FAILED
    assert states[2] is not State.SUCCEEDED
    assert store.find(jobs[1].id).error["reason"] == "INVALID_REQUEST"


def test_an_answer_that_names_a_withdrawn_item_is_tried_again_and_the_others_are_written(quick, engine, store, new_job):
    jobs = create(store, new_job, 3)

    def gone(_connection):
        raise ItemWithdrawn("withdrawn meanwhile")

    def work(claim, beat):
        return Outcome(RESULT, also=gone, named=[9]) if claim.job.id == jobs[1].id else Outcome(RESULT, named=[8])

    item(engine, 9, withdrawn=True)
    quick.run_waiting(Stage.LOOKUP, work, "r1")
    assert [store.find(job.id).state for job in jobs] == [State.SUCCEEDED, State.QUEUED, State.SUCCEEDED]
    assert store.results(jobs[1].id) == {} and store.find(jobs[1].id).attempt == 1


def test_a_stop_in_the_middle_hands_back_what_was_not_begun(quick, store, new_job):
    jobs = create(store, new_job, 3)

    def work(claim, beat):
        quick._stop.set()
        return Outcome(RESULT)

    quick.run_waiting(Stage.LOOKUP, work, "r1")
    assert [store.find(job.id).state for job in jobs] == [State.SUCCEEDED, State.QUEUED, State.QUEUED]
    assert [store.find(job.id).attempt for job in jobs[1:]] == [0, 0]


def test_a_worker_that_dies_in_the_middle_of_a_batch_loses_nothing_and_the_jobs_come_back_one_by_one(
    quick, store, new_job, let_pass
):
    jobs = create(store, new_job, 3)

    class Killed(BaseException):
        """What no handler catches: the process is gone."""

    def work(claim, beat):
        if claim.job.id == jobs[1].id:
            raise Killed
        return Outcome(RESULT)

    with pytest.raises(Killed):
        quick.run_waiting(Stage.LOOKUP, work, "r1")
    assert [store.find(job.id).state for job in jobs] == [State.RUNNING] * 3
    for job in jobs:
        let_pass(job.id, "lease_until")
    assert len(store.expire_leases()) == 3
    assert take(store) == []  # not together again: one of them may be what killed the worker
    for job in jobs:
        let_pass(job.id, "next_attempt_at")
        quick.run(job.id, Stage.LOOKUP, lambda claim, beat: Outcome(RESULT), "r1")
    assert [store.find(job.id).state for job in jobs] == [State.SUCCEEDED] * 3
    assert all(len(store.results(job.id)) == 1 for job in jobs)


def test_a_batch_is_as_large_as_its_work_is_short(runner, store, new_job):
    create(store, new_job, 30)
    runner._mean_s = 0.5
    assert runner.run_waiting(Stage.LOOKUP, lambda claim, beat: Outcome(RESULT)) == 1
    runner._mean_s = 0.0
    assert runner.run_waiting(Stage.LOOKUP, lambda claim, beat: Outcome(RESULT)) > 10
    assert quiet(runner, store)


def quiet(runner, store) -> bool:
    """Take the rest; True when nothing waits any more."""
    while runner.run_waiting(Stage.LOOKUP, lambda claim, beat: Outcome(RESULT)):
        pass
    return take(store) == []


def test_leases_of_a_long_batch_are_kept_and_a_cancelled_job_is_noticed(store, new_job):
    runner = BatchRunner(store, "w", 30.0, time.monotonic, heartbeat_s=0.02, stop=threading.Event())
    runner._mean_s = 0.0
    jobs = create(store, new_job, 2)

    def work(claim, beat):
        if claim.job.id == jobs[0].id:
            store.cancel("p", jobs[1].id)
            ends = time.monotonic() + 20
            while time.monotonic() < ends and store.find(jobs[0].id).lease_until == claim.job.lease_until:
                threading.Event().wait(0.01)
            threading.Event().wait(0.1)
        return Outcome(RESULT)

    runner.run_waiting(Stage.LOOKUP, work)
    assert [store.find(job.id).state for job in jobs] == [State.SUCCEEDED, State.CANCELLED]


def test_a_batch_that_hangs_is_not_kept_alive_for_ever(store, new_job):
    """Its leases run out, so its jobs go to others."""
    now, beaten = [0.0], threading.Event()
    runner = BatchRunner(store, "w", 30.0, lambda: now[0], heartbeat_s=0.01, stop=threading.Event())
    create(store, new_job, 1)
    beat = store.heartbeat
    store.heartbeat = lambda *asked: (beat(*asked), beaten.set())[0]

    def hearts():
        return [thread for thread in threading.enumerate() if thread.name == "heartbeat"]

    def work(claim, beat):
        assert beaten.wait(20)  # it is kept at first
        now[0] = batch.LONGEST_S + 1
        for heart in hearts():
            heart.join(20)
        assert not hearts()
        return Outcome(RESULT)

    assert runner.run_waiting(Stage.LOOKUP, work) == 1
    assert store.find(store.list("p", [], 10, None)[0].id).state is State.SUCCEEDED


# --- what is announced -------------------------------------------------------------------------------------


def test_waiting_work_room_for_a_doorbell_and_first_answers_are_announced(store, new_job, jobs_database_url):
    heard, stop, connected, told = [], threading.Event(), threading.Event(), threading.Event()

    def on_event(channel, payload):
        heard.append((channel, payload))
        if len(heard) == 6:
            told.set()

    listener = Listener(jobs_database_url, [QUEUED, ANSWERED], stop, on_event, connected.set)
    listener.start()
    try:
        assert connected.wait(10)
        (job,) = create(store, new_job, 1, tier=Tier.VERIFIED)
        (claim,) = take(store)
        store.complete(claim, RESULT)
        store.fail(store.claim(job.id, Stage.VERIFY, "w", 30), ItemWithdrawn("x"), retry=True)
        store.cancel("p", job.id)
        assert told.wait(10)
    finally:
        stop.set()
        listener.join()
    queued = [payload for channel, payload in heard if channel == QUEUED]
    assert queued == ["lookup", "verify", "verify taken", "verify again", "verify taken"]
    assert [payload for channel, payload in heard if channel == ANSWERED] == [str(job.id)]
