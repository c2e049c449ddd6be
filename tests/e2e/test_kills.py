"""kill -9 in the middle of jobs loses none: the workers, Redis, and everything Redis holds."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence

import pytest
import redis

from byline.catalog.items import Item
from byline.client import Client, Job
from byline.jobs import TERMINAL, Stage, State

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


def test_killing_the_lookup_worker_in_the_middle_of_jobs_loses_none(
    cluster: Cluster, picture: Picture, project: str
) -> None:
    with cluster.client(project) as client:
        jobs = submit(client, picture, 20)
        eventually(running(cluster, jobs, Stage.LOOKUP), "a running lookup")
        cluster.kill("lookup")
        jobs += submit(client, picture, 3)
        cluster.start("lookup")
        all_ended(cluster, jobs)
    check_promises(cluster, jobs, [Stage.LOOKUP])


def test_killing_only_the_child_of_the_lookup_worker_loses_none(
    cluster: Cluster, picture: Picture, project: str
) -> None:
    import psutil

    with cluster.client(project) as client:
        jobs = submit(client, picture, 10)
        eventually(running(cluster, jobs, Stage.LOOKUP), "a running lookup")
        psutil.Process(cluster.child_of("lookup")).kill()
        all_ended(cluster, jobs)
    check_promises(cluster, jobs, [Stage.LOOKUP])


def test_killing_the_verification_worker_in_the_middle_of_a_job_loses_none(
    cluster: Cluster, picture: Picture, project: str
) -> None:
    with cluster.client(project) as client:
        jobs = submit(client, picture, 2, tier="VERIFIED")
        eventually(running(cluster, jobs, Stage.VERIFY), "a running verification")
        cluster.kill("verification")
        cluster.start("verification")
        all_ended(cluster, jobs)
    check_promises(cluster, jobs, [Stage.LOOKUP, Stage.VERIFY])
    reasons = [event.reason for job in jobs for event in cluster.jobs.events(uuid.UUID(job.id))]
    assert any("LEASE_EXPIRED" in reason for reason in reasons), reasons


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
    with cluster.client(project) as client:
        jobs = submit(client, picture, 10)
        cluster.valkey.process.popen.kill()
        cluster.valkey.process.popen.wait()
        jobs += submit(client, picture, 5)  # Redis is away: the gateway still accepts
        cluster.valkey.start()
        all_ended(cluster, jobs)
    check_promises(cluster, jobs, [Stage.LOOKUP])


def test_wiping_redis_in_the_middle_of_jobs_loses_none(cluster: Cluster, picture: Picture, project: str) -> None:
    with cluster.client(project) as client:
        jobs = submit(client, picture, 10)
        redis.Redis.from_url(cluster.valkey.url).flushall()
        jobs += submit(client, picture, 5)
        all_ended(cluster, jobs)
    check_promises(cluster, jobs, [Stage.LOOKUP])
