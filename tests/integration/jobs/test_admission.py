"""Creating jobs: acknowledged means kept, the same request means the same job, queues are bounded."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text

from byline.db.session import single_statements
from byline.errors import InvalidRequest, QueueFull, QuotaExceeded, RequestIdReused
from byline.jobs import Kind, Stage, State, Tier
from byline.jobs.store import JobStore


def test_a_created_job_comes_back_as_it_was_asked_for(store, new_job):
    new = new_job(embedding=(0.5, -1.0), image_sha256=None, tier=Tier.VERIFIED, payload={"a": [1]}, ttl_s=60)
    job, created = store.create(new)
    assert created
    assert store.get("p", job.id) == job
    assert (job.state, job.stage, job.attempt, job.fence) == (State.QUEUED, Stage.LOOKUP, 0, 0)
    assert (job.embedding, job.payload, job.tier) == (new.embedding, new.payload, Tier.VERIFIED)
    assert (job.expire_time - job.create_time).total_seconds() == 60
    assert [event.to_state for event in store.events(job.id)] == [State.QUEUED]


def test_a_ranking_job_starts_in_its_own_stage(store, new_job):
    assert store.create(new_job(kind=Kind.RANKING))[0].stage is Stage.RANK


def test_the_same_request_gives_the_same_job(store, new_job):
    first, created = store.create(new_job("r"))
    again, created_again = store.create(new_job("r"))
    assert (created, created_again) == (True, False)
    assert first == again


def test_the_same_request_gives_the_job_as_it_is_now(store, new_job):
    job, _ = store.create(new_job("r"))
    store.cancel("p", job.id)
    assert store.create(new_job("r"))[0].state is State.CANCELLED


def test_the_same_id_with_other_contents_is_refused(store, new_job):
    job, _ = store.create(new_job("r"))
    with pytest.raises(RequestIdReused) as raised:
        store.create(new_job("r", prompt="a dog"))
    assert raised.value.metadata["existing_job"] == str(job.id)


def test_two_projects_may_use_the_same_request_id(store, new_job):
    one, _ = store.create(new_job("r", project_id="p"))
    other, created = store.create(new_job("r", project_id="q"))
    assert created
    assert one.id != other.id


def test_of_many_concurrent_equal_requests_one_creates(store, new_job):
    barrier = threading.Barrier(8)

    def create(_: int):
        barrier.wait(10)
        return store.create(new_job("r"))

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(create, range(8)))
    assert sum(created for _, created in answers) == 1
    assert len({job.id for job, _ in answers}) == 1
    assert len(store.list("p")) == 1


def test_batches_with_common_ids_in_opposite_order_do_not_deadlock(store, new_job):
    names = [f"r{number}" for number in range(40)]
    barrier = threading.Barrier(2)

    def create(order: list[str]):
        barrier.wait(10)
        return store.create_many([new_job(name) for name in order])

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(create, [names, names[::-1]])
    assert {job.id for job, _ in one} == {job.id for job, _ in other}
    assert sum(created for _, created in [*one, *other]) == 40


def test_a_batch_is_answered_in_order_and_counts_a_repeat_once(store, new_job):
    answers = store.create_many([new_job("b"), new_job("a"), new_job("b")])
    assert [job.request_id for job, _ in answers] == ["b", "a", "b"]
    assert [created for _, created in answers] == [True, True, False]


def test_a_batch_with_one_refused_request_creates_nothing(store, new_job):
    store.create(new_job("used"))
    with pytest.raises(RequestIdReused):
        store.create_many([new_job("fresh"), new_job("used", prompt="a dog")])
    assert [job.request_id for job in store.list("p")] == ["used"]


def test_an_empty_batch_is_answered(store):
    assert store.create_many([]) == []


def test_a_prompt_postgres_cannot_hold_is_refused_as_invalid(store, new_job):
    with pytest.raises(InvalidRequest):
        store.create(new_job(prompt="a\x00b"))


def test_a_full_queue_refuses_new_jobs_and_answers_old_ones(engine, new_job):
    store = JobStore(engine, bounds={Stage.LOOKUP: 3}, rng=random.Random(1))
    for name in "abc":
        store.create(new_job(name))
    with pytest.raises(QueueFull) as raised:
        store.create(new_job("d"))
    assert raised.value.retry_after_s
    assert store.create(new_job("a"))[1] is False
    assert len(store.list("p")) == 3


def test_concurrent_creators_do_not_overshoot_the_bound(engine, new_job):
    store = JobStore(engine, bounds={Stage.LOOKUP: 5}, rng=random.Random(1))
    barrier = threading.Barrier(10)

    def create(number: int) -> bool:
        barrier.wait(10)
        try:
            return store.create(new_job(f"r{number}"))[1]
        except QueueFull:
            return False

    with ThreadPoolExecutor(10) as pool:
        assert sum(pool.map(create, range(10))) == 5


def test_a_project_that_has_its_share_waiting_is_refused_and_others_still_get_in(engine, new_job):
    store = JobStore(engine, bounds={Stage.LOOKUP: 6}, project_share=0.5, rng=random.Random(1))
    for name in "abc":
        store.create(new_job(name, project_id="greedy"))
    with pytest.raises(QuotaExceeded) as raised:
        store.create(new_job("d", project_id="greedy"))
    assert raised.value.retry_after_s and raised.value.metadata["project"] == "greedy"
    assert store.create(new_job("a", project_id="greedy"))[1] is False, "what was accepted is answered"
    assert store.create(new_job("d", project_id="modest"))[1]
    store.claim(store.list("greedy")[0].id, Stage.LOOKUP, "w", 30)
    assert store.create(new_job("d", project_id="greedy"))[1], "room comes back"


def test_concurrent_creators_do_not_overshoot_their_projects_share(engine, new_job):
    store = JobStore(engine, bounds={Stage.LOOKUP: 10}, project_share=0.4, rng=random.Random(1))
    barrier = threading.Barrier(12)

    def create(number: int) -> bool:
        barrier.wait(10)
        try:
            return store.create(new_job(f"r{number}", project_id=f"p{number % 2}"))[1]
        except QuotaExceeded:
            return False

    with ThreadPoolExecutor(10) as pool, ThreadPoolExecutor(2) as more:
        made = [pool.submit(create, number) for number in range(10)]
        made += [more.submit(create, number) for number in (10, 11)]
        assert sum(one.result(60) for one in made) == 8


def test_a_share_holds_on_the_short_way_in_too(engine, new_job):
    store = JobStore(engine, bounds={Stage.LOOKUP: 600}, project_share=0.5, rng=random.Random(1))

    def alone(name, project):
        with engine.connect() as connection, connection.begin():
            return store.create_alone(connection, new_job(name, project_id=project))

    for number in range(44):
        assert alone(f"r{number}", "greedy")
    assert alone("more", "greedy") is None, "near its share, the whole check is made"
    assert alone("more", "modest")


def test_room_comes_back_when_a_job_leaves_the_queue(engine, new_job):
    store = JobStore(engine, bounds={Stage.LOOKUP: 1}, rng=random.Random(1))
    job, _ = store.create(new_job())
    assert store.claim(job.id, Stage.LOOKUP, "w", 30)
    assert store.create(new_job())[1]


def test_verified_jobs_are_bounded_before_they_reach_the_slow_queue(engine, new_job):
    store = JobStore(engine, bounds={Stage.LOOKUP: 100, Stage.VERIFY: 2}, rng=random.Random(1))
    for _ in range(2):
        store.create(new_job(tier=Tier.VERIFIED))
    with pytest.raises(QueueFull):
        store.create(new_job(tier=Tier.VERIFIED))
    assert store.create(new_job(tier=Tier.RETRIEVED))[1]


# --- one statement for the common case ---------------------------------------------------------------------


def count(engine):
    with engine.begin() as connection:
        return connection.execute(text("SELECT count(*) FROM jobs")).scalar_one()


def alone(engine, store, new, **more):
    with single_statements(engine) as connection:
        return store.create_alone(connection, new, **more)


def test_one_statement_makes_the_same_job_as_the_long_way(engine, store, new_job):
    for fields in ({}, {"image_sha256": None, "embedding": (0.5, -1.0)}, {"payload": {"a": [1, "x"]}, "ttl_s": 60.0}):
        one = alone(engine, store, new_job("short", **fields))
        other, _ = store.create(new_job("long", **fields))
        own = ("id", "request_id", "create_time", "update_time", "expire_time")
        assert {**vars(one), **dict.fromkeys(own)} == {**vars(other), **dict.fromkeys(own)}
        assert (one.expire_time - one.create_time) == (other.expire_time - other.create_time)
        assert [event.reason for event in store.events(one.id)] == ["created"]
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM jobs"))


@pytest.mark.parametrize("case", ["exists", "several stages", "curation", "near its bound"])
def test_one_statement_does_nothing_where_the_long_way_must_decide(case, engine, store, new_job):
    new = new_job("r")
    if case == "exists":
        store.create(new)
    elif case == "several stages":
        new = new_job("r", tier=Tier.VERIFIED)
    elif case == "curation":
        new = new_job("r", kind=Kind.RANKING)
    else:
        store = JobStore(engine, {Stage.LOOKUP: 258})
        assert [alone(engine, store, new_job(str(n))) is not None for n in range(2)] == [True, True]
    before = count(engine)
    assert alone(engine, store, new) is None and count(engine) == before
