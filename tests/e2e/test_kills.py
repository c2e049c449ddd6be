"""kill -9 in the middle of jobs loses none: the workers, Redis, and everything Redis holds.

Each test first proves that there is something to interrupt: a worker is frozen (SIGSTOP) while a claim of its
child is RUNNING, or before Redis dies with the doorbells of jobs nobody has claimed.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psutil
import pytest
import redis

from byline.catalog.items import Item
from byline.client import Client, Job
from byline.jobs import TERMINAL, Stage, State
from byline.queue import LOOKUP

from .conftest import PATIENCE_S, Cluster, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(3600)]

Picture = Callable[[int], tuple[bytes, Item]]


def submit(client: Client, picture: Picture, count: int, **options: object) -> list[Job]:
    jobs = []
    for number in range(count):
        data, item = picture(number)
        jobs.append(client.submit(data, prompt=f"{item.caption} {number}", **options))  # type: ignore[arg-type]
    return jobs


def states(cluster: Cluster, jobs: Sequence[Job]) -> list[State]:
    found = [cluster.jobs.find(uuid.UUID(job.id)) for job in jobs]
    assert all(job is not None for job in found), "an acknowledged job is gone"
    return [job.state for job in found if job is not None]


def all_ended(cluster: Cluster, jobs: Sequence[Job]) -> None:
    def ended() -> bool:
        return all(state in TERMINAL for state in states(cluster, jobs))

    eventually(ended, "the end of every job", 3 * PATIENCE_S)


def check_promises(cluster: Cluster, jobs: Sequence[Job], stages: Sequence[Stage]) -> None:
    """Every job succeeded, reached its end once, and each stage took effect once, from one release."""
    assert states(cluster, jobs) == [State.SUCCEEDED] * len(jobs)
    for job in jobs:
        ends = [event for event in cluster.jobs.events(uuid.UUID(job.id)) if event.to_state in TERMINAL]
        results = cluster.jobs.results(uuid.UUID(job.id))
        assert len(ends) == 1
        assert list(results) == list(stages)
        named = {result.release_id for result in results.values()}
        assert len(named) == 1
        assert named == {result.result["release_id"] for result in results.values()}


def running(cluster: Cluster, jobs: Sequence[Job], stage: Stage) -> Callable[[], bool]:
    def found() -> bool:
        rows = [cluster.jobs.find(uuid.UUID(job.id)) for job in jobs]
        return any(row is not None and row.state is State.RUNNING and row.stage is stage for row in rows)

    return found


def freeze_at_work(cluster: Cluster, worker: str, jobs: Sequence[Job], stage: Stage) -> Job:
    """SIGSTOP the worker's child while it holds one of the jobs; that job, still RUNNING under its lease."""
    child = psutil.Process(cluster.child_of(worker))
    pause = threading.Event()

    def held() -> Job | None:
        for job in jobs:
            row = cluster.jobs.find(uuid.UUID(job.id))
            if row is not None and row.state is State.RUNNING and row.stage is stage:
                assert row.lease_owner is not None
                return job if row.lease_owner.endswith(f":{child.pid}") else None
        return None

    def frozen() -> Job | None:
        child.suspend()
        found = held()
        if found is not None:
            pause.wait(0.3)  # what the child had sent before it froze has reached the database by now
            found = held()
        if found is None:
            child.resume()
        return found

    return eventually(frozen, f"a job in stage {stage} that can be frozen")


@contextmanager
def asleep(cluster: Cluster, worker: str) -> Iterator[None]:
    """The worker hears no doorbell until the block ends: parent and child are stopped (SIGSTOP)."""
    parent = psutil.Process(cluster.processes[worker].identity.pid)
    family = [parent, *parent.children()]
    for process in family:
        process.suspend()
    try:
        yield
    finally:
        for process in reversed(family):
            process.resume()


def doorbells_out(cluster: Cluster, jobs: Sequence[Job]) -> None:
    """Wait until every job's doorbell is in Redis and prove that nobody has answered one."""

    def dispatched() -> bool:
        rows = [cluster.jobs.find(uuid.UUID(job.id)) for job in jobs]
        return all(row is not None and row.dispatched_at is not None for row in rows)

    eventually(dispatched, "a doorbell for every job")
    assert states(cluster, jobs) == [State.QUEUED] * len(jobs)


def waiting_in_redis(cluster: Cluster) -> int:
    """How many doorbells lie in the lookup queue's list."""
    client = redis.Redis.from_url(cluster.valkey.url)
    try:
        return sum(int(client.llen(key)) for key in client.scan_iter(f"byline:{LOOKUP}*", _type="list"))
    finally:
        client.close()


def taken_over(cluster: Cluster, job: Job) -> None:
    """The dead worker's lease ran out, and another claim with a higher fence finished the job."""
    events = cluster.jobs.events(uuid.UUID(job.id))
    assert any("LEASE_EXPIRED" in event.reason for event in events), [event.reason for event in events]
    claims = [event for event in events if event.to_state is State.RUNNING]
    assert len({event.fence for event in claims}) >= 2, claims


def test_killing_the_lookup_worker_in_the_middle_of_jobs_loses_none(
    cluster: Cluster, picture: Picture, project: str
) -> None:
    with cluster.client(project) as client:
        with asleep(cluster, "lookup"):
            jobs = submit(client, picture, 20)
        interrupted = freeze_at_work(cluster, "lookup", jobs, Stage.LOOKUP)
        cluster.kill("lookup")
        jobs += submit(client, picture, 3)
        cluster.start("lookup")
        all_ended(cluster, jobs)
    check_promises(cluster, jobs, [Stage.LOOKUP])
    taken_over(cluster, interrupted)


def test_killing_only_the_child_of_the_lookup_worker_loses_none(
    cluster: Cluster, picture: Picture, project: str
) -> None:
    with cluster.client(project) as client:
        cluster.ready("lookup")
        with asleep(cluster, "lookup"):
            jobs = submit(client, picture, 20)
        interrupted = freeze_at_work(cluster, "lookup", jobs, Stage.LOOKUP)
        psutil.Process(cluster.child_of("lookup")).kill()
        all_ended(cluster, jobs)
    check_promises(cluster, jobs, [Stage.LOOKUP])
    taken_over(cluster, interrupted)


def test_killing_the_verification_worker_in_the_middle_of_a_job_loses_none(
    cluster: Cluster, picture: Picture, project: str
) -> None:
    with cluster.client(project) as client:
        jobs = submit(client, picture, 2, tier="VERIFIED")
        interrupted = freeze_at_work(cluster, "verification", jobs, Stage.VERIFY)
        cluster.kill("verification")
        cluster.start("verification")
        all_ended(cluster, jobs)
    check_promises(cluster, jobs, [Stage.LOOKUP, Stage.VERIFY])
    taken_over(cluster, interrupted)


def test_stopping_the_verification_worker_gracefully_hands_its_job_back(
    cluster: Cluster, picture: Picture, project: str
) -> None:
    with cluster.client(project) as client:
        jobs = submit(client, picture, 1, tier="VERIFIED")
        eventually(running(cluster, jobs, Stage.VERIFY), "a running verification")
        assert cluster.stop("verification") == 0
        row = cluster.jobs.find(uuid.UUID(jobs[0].id))
        assert row is not None and row.state in (State.QUEUED, State.SUCCEEDED)
        assert cluster.report("verification") is None
        cluster.start("verification")
        all_ended(cluster, jobs)
    check_promises(cluster, jobs, [Stage.LOOKUP, Stage.VERIFY])


def test_killing_redis_in_the_middle_of_jobs_loses_none(cluster: Cluster, picture: Picture, project: str) -> None:
    cluster.ready("lookup")
    with cluster.client(project) as client:
        with asleep(cluster, "lookup"):
            jobs = submit(client, picture, 10)
            doorbells_out(cluster, jobs)
            assert waiting_in_redis(cluster) > 0
            cluster.valkey.process.popen.kill()
            cluster.valkey.process.popen.wait()
            jobs += submit(client, picture, 5)  # Redis is away: the gateway still accepts
            assert states(cluster, jobs) == [State.QUEUED] * len(jobs)
        cluster.valkey.start()
        all_ended(cluster, jobs)
    check_promises(cluster, jobs, [Stage.LOOKUP])


def test_wiping_redis_in_the_middle_of_jobs_loses_none(cluster: Cluster, picture: Picture, project: str) -> None:
    cluster.ready("lookup")
    with cluster.client(project) as client:
        with asleep(cluster, "lookup"):
            jobs = submit(client, picture, 10)
            doorbells_out(cluster, jobs)
            assert waiting_in_redis(cluster) > 0
            redis.Redis.from_url(cluster.valkey.url).flushall()
            jobs += submit(client, picture, 5)
            assert states(cluster, jobs) == [State.QUEUED] * len(jobs)
        all_ended(cluster, jobs)
    check_promises(cluster, jobs, [Stage.LOOKUP])
