"""Cancelling, reading and listing; one project never sees another's jobs."""

from __future__ import annotations

import uuid

import pytest
from sqlalchemy import text

from byline.errors import BylineError, JobNotCancellable, JobNotFound
from byline.jobs import Stage, State


def running(store, new_job):
    job, _ = store.create(new_job())
    return store.claim(job.id, Stage.LOOKUP, "w", 30)


def test_a_queued_job_is_cancelled_at_once(store, new_job):
    job, _ = store.create(new_job())
    assert store.cancel("p", job.id).state is State.CANCELLED
    assert store.claim(job.id, Stage.LOOKUP, "w", 30) is None


def test_a_running_job_is_asked_to_stop_and_its_worker_hears_it(store, new_job):
    claim = running(store, new_job)
    assert store.cancel("p", claim.job.id).state is State.CANCELLING
    assert store.heartbeat(claim, 0, 0, 30) is True
    assert store.acknowledge_cancel(claim).state is State.CANCELLED


@pytest.mark.parametrize("end", ["complete", "fail", "release"])
def test_a_worker_that_ends_a_cancelling_job_in_any_way_leaves_it_cancelled(end, store, new_job):
    claim = running(store, new_job)
    store.cancel("p", claim.job.id)
    if end == "complete":
        job = store.complete(claim, {"late": True})
    elif end == "fail":
        job = store.fail(claim, BylineError("x"), retry=True)
    else:
        job = store.release(claim)
    assert job.state is State.CANCELLED
    assert store.results(job.id) == {}


def test_a_cancelling_job_whose_worker_died_ends_cancelled(store, new_job, let_pass):
    claim = running(store, new_job)
    store.cancel("p", claim.job.id)
    let_pass(claim.job.id, "lease_until")
    assert store.claim(claim.job.id, Stage.LOOKUP, "other", 30) is None
    assert [job.state for job in store.expire_leases()] == [State.CANCELLED]


def test_cancelling_twice_is_harmless(store, new_job):
    claim = running(store, new_job)
    store.cancel("p", claim.job.id)
    assert store.cancel("p", claim.job.id).state is State.CANCELLING
    store.acknowledge_cancel(claim)
    assert store.cancel("p", claim.job.id).state is State.CANCELLED


def test_a_job_that_ended_cannot_be_cancelled(store, new_job):
    claim = running(store, new_job)
    store.complete(claim, {})
    with pytest.raises(JobNotCancellable):
        store.cancel("p", claim.job.id)


def test_another_projects_job_does_not_exist(store, new_job):
    job, _ = store.create(new_job(project_id="other"))
    for call in (store.get, store.cancel):
        with pytest.raises(JobNotFound):
            call("p", job.id)
        with pytest.raises(JobNotFound):
            call("p", uuid.uuid4())
    assert store.list("p") == []
    assert store.find(job.id) == job


def test_pages_neither_skip_nor_repeat_while_jobs_arrive(store, new_job, engine):
    wanted = [store.create(new_job(f"old-{number}"))[0].id for number in range(11)]
    with engine.begin() as connection:  # equal times: the id decides
        connection.execute(text("UPDATE jobs SET create_time = now() - interval '1 minute'"))
    seen, after = [], None
    while page := store.list("p", page_size=4, after=after):
        seen += [job.id for job in page]
        after = (page[-1].create_time, page[-1].id)
        store.create(new_job())
    assert sorted(seen) == sorted(wanted)


def test_the_newest_job_comes_first_and_states_filter(store, new_job):
    first, _ = store.create(new_job())
    second, _ = store.create(new_job())
    assert [job.id for job in store.list("p")] == [second.id, first.id]
    store.cancel("p", second.id)
    assert [job.id for job in store.list("p", [State.CANCELLED])] == [second.id]
    assert [job.id for job in store.list("p", [State.QUEUED, State.RUNNING])] == [first.id]
